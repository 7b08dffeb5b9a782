"""The rules of CONTRIBUTING.md that a program can check, file by file."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "ttl", "consolidation", "streams", "scripts"]  # an import goes left only
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100


def each(paths: list[Path]):
    """Run a test once per file, named by its path in the repository."""
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def imports(node: ast.AST, *, in_functions: bool = True) -> Iterator[str]:
    """Yield the dotted names imported below `node`; relative ones start with a dot."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{'.' * child.level}{child.module}.{alias.name}" for alias in child.names)
        elif in_functions or not isinstance(child, FUNCTIONS):
            yield from imports(child, in_functions=in_functions)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def top(name: str) -> str:
    return name.partition(".")[0]


@each(SOURCES)
def test_imports_go_left_only(path):
    layer = path.relative_to(ROOT).parts[0]
    allowed = {"configs", *LAYERS[: LAYERS.index(layer) + 1]}
    ours = [name.split(".")[1] for name in imports(parse(path)) if top(name) == "wakesleep"]
    assert set(ours) <= allowed


@each(SOURCES + TESTS)
def test_imports_use_the_full_name(path):
    """A bare `ttl` or a relative import would load a second copy of every class."""
    wrong = [name for name in imports(parse(path)) if top(name) in {"", *LAYERS}]
    assert wrong == []


@each([path for path in SOURCES if path.relative_to(ROOT).parts[0] in {"kernels", "ttl"}])
def test_the_model_needs_torch_alone(path):
    allowed = {"wakesleep", "torch", "numpy", *sys.stdlib_module_names}
    if path.stem.endswith("_triton"):
        allowed.add("triton")
    tree = parse(path)
    assert {top(name) for name in imports(tree, in_functions=False)} <= allowed
    assert {top(name) for name in imports(tree)} <= {*allowed, "safetensors"}


@each(SOURCES)
def test_only_training_imports_lightning(path):
    if path.parent == ROOT / "streams" and path.stem.startswith("training"):
        return
    assert not {"lightning", "pytorch_lightning"} & {top(name) for name in imports(parse(path))}


@each(SOURCES + TESTS)
def test_no_module_needs_a_posix_system_to_be_imported(path):
    names = {top(name) for name in imports(parse(path), in_functions=False)}
    assert not {"fcntl", "resource"} & names


def test_kernels_is_a_namespace_without_init():
    assert list((ROOT / "kernels").rglob("__init__.py")) == []


@each(SOURCES + TESTS)
def test_files_and_functions_fit_the_reader(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, FUNCTIONS)]
    long = [f.name for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES]
    assert long == []
