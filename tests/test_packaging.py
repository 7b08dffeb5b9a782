"""What is installed: the wheel, the editable mode, and what an import loads."""

import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["kernels", "ttl", "consolidation", "streams", "configs"]


def packaged_files() -> set[str]:
    """Return every file of the packaged folders, by its path in the repository."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def run_python(code: str, cwd: Path) -> str:
    """Run `code` in a fresh interpreter; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", dedent(code)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy: a build leaves folders behind, which the next one reads
    for name in sorted(packaged_files() | {"pyproject.toml", "README.md", "LICENSE"}):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {f"wakesleep/{name}" for name in packaged_files()}
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "wakesleep = wakesleep.streams.cli:main" in archive.read(points).decode()


def test_the_installed_package_finds_every_data_file():
    for name in packaged_files():
        folder, *rest = name.split("/")
        if not name.endswith(".py"):
            assert resources.files(f"wakesleep.{folder}").joinpath(*rest).is_file(), name


MODEL_MODULES = sorted(
    f"wakesleep.{folder}.{path.stem}".removesuffix(".__init__")
    for folder in ("kernels", "ttl")
    for path in (ROOT / folder).glob("*.py")
    if not path.stem.endswith("_triton")
)


def test_the_model_imports_with_torch_alone(tmp_path):
    """A machine that has torch and nothing else of ours can import every module of the model."""
    others = ["lightning", "omegaconf", "safetensors", "rich", "tokenizers", "matplotlib"]
    others += ["triton", "wandb", "optuna", "yaml", "torchmetrics", "pytest", "setuptools"]
    code = f"""
        import importlib, sys
        sys.modules.update(dict.fromkeys({others}))  # None: every import of it raises
        for module in {MODEL_MODULES}:
            importlib.import_module(module)
    """
    run_python(code, cwd=tmp_path)


def test_importing_the_model_queries_no_device(tmp_path):
    code = f"""
        import importlib, torch

        def refuse(*args, **kwargs):
            raise AssertionError("a device was queried at import")

        for owner, names in [
            (torch.cuda, ["is_available", "device_count", "current_device", "init"]),
            (torch.backends.mps, ["is_available", "is_built"]),
            (torch.accelerator, ["is_available", "device_count", "current_accelerator"]),
        ]:
            for name in names:
                setattr(owner, name, refuse)
        for module in {MODEL_MODULES}:
            importlib.import_module(module)
    """
    run_python(code, cwd=tmp_path)


def test_no_module_is_loaded_twice_from_the_repository_root():
    """There the bare folder names can be imported by accident, as second copies."""
    code = f"""
        import importlib, sys
        for module in {[*MODEL_MODULES, "wakesleep.streams", "wakesleep.consolidation"]}:
            importlib.import_module(module)
        print(sorted(set(sys.modules) & set({FOLDERS})))
    """
    assert run_python(code, cwd=ROOT).strip() == "[]"


def test_light_imports_stay_light(tmp_path):
    """The command line answers before torch is loaded."""
    code = """
        import sys, wakesleep.streams
        wakesleep.streams.__dir__()
        print(sorted({"torch", "lightning", "numpy", "rich"} & set(sys.modules)))
    """
    assert run_python(code, cwd=tmp_path).strip() == "[]"
