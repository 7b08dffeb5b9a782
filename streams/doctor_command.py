"""`wakesleep doctor`: what is installed and whether it fits together, to paste into a report."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from wakesleep.streams.allocator import allocator
from wakesleep.streams.console import Console, shortened
from wakesleep.streams.errors import Refused

SUMMARY = "check the installation: versions, device, allocator, bundled files"
FLAGS = ("--json", "--quiet", "--debug")
PACKAGES = ("wakesleep", "torch", "lightning", "torchmetrics", "numpy", "omegaconf", "safetensors")
PACKAGES += ("rich", "tokenizers", "matplotlib", "triton", "torchvision", "wandb", "optuna")
BUNDLED = (
    "default/config.json",
    "default/model.safetensors",
    "default/tokenizer.json",
    "default/known.json",
    "document.txt.xz",
    "document.json",
)
HASH_SHOWN = 16  # hexadecimal digits; all of them with --json


def help_text() -> str:
    return """\
wakesleep doctor [--json]

  wakesleep doctor            a table to paste into a report of a problem
  wakesleep doctor --json     the same for a program, with whole hashes

Looks at versions, at the device that device=auto takes, at threads and at the
memory allocator, and checks that the bundled model and document are complete.
Exit code 1 if something is wrong; the lines under "Problems" say what to do.
--quiet with --json: only the object. --debug: tracebacks.

The memory allocator: on Linux, stream, ask and train restart themselves once,
under the same process id, with GLIBC_TUNABLES set so that memory pages are
kept. WAKESLEEP_MALLOC=default in the environment leaves that out. A malloc in
LD_PRELOAD (tcmalloc, jemalloc) or a GLIBC_TUNABLES of yours is left alone."""


def run(arguments: argparse.Namespace) -> int:
    """Look at everything, print it, and return 1 if there is a problem."""
    if arguments.items:
        raise Refused(f"doctor takes no {arguments.items[0]}", "", "See wakesleep doctor --help")
    findings = examine()
    Console(json=arguments.json, quiet=arguments.quiet).result(findings, as_text(findings))
    return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """What was found, as plain values; `problems` is a list of sentences."""
    import torch

    versions = {name: _version(name) for name in PACKAGES}
    files = {name: _bundled(name) for name in BUNDLED}
    clash = torchvision_clash()
    missing = [f"{name} is missing from the installation" for name in files if not files[name]]
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": _platform(),
        "device": _device(),
        "dtype": _dtype(),
        "threads": torch.get_num_threads(),
        "cores": _cores(),
        "allocator": allocator(os.environ),
        "allocator_of_commands": _allocator_of_commands(),
        "triton": versions["triton"] is not None,
        "files": files,
        "problems": [
            *missing,
            *_document_problems(files),
            *([] if missing else _model_problems()),
            *([clash] if clash else []),
        ],
    }


def torchvision_clash() -> str | None:
    """Name the cure where an installed torchvision was built for another torch.

    Such a one breaks `import lightning`: torchmetrics imports it and it fails at its operators.
    """
    torch, torchvision = _version("torch"), _version("torchvision")
    if torchvision is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError):
        what = f"torchvision {torchvision} does not match torch {torch}"
        return f"{what}; run: pip uninstall torchvision"
    return None


def as_text(findings: dict[str, Any]) -> str:
    """The findings as a table for people."""
    versions = [
        (name, version or "not installed") for name, version in findings["versions"].items()
    ]
    files = [
        (name, f"{file['bytes']:,} bytes, sha256 {file['sha256'][:HASH_SHOWN]}")
        for name, file in findings["files"].items()
        if file
    ]
    machine = [
        ("python", findings["python"]),
        ("platform", findings["platform"]),
        ("device", findings["device"]),
        ("dtype", f"{findings['dtype']} (dtype=auto)"),
        ("threads", f"{findings['threads']} of {findings['cores']} cores"),
        ("allocator", f"{findings['allocator_of_commands']} (stream, ask, train)"),
    ]
    problems = [("", problem) for problem in findings["problems"]] or [("", "none")]
    blocks = {
        "Versions": versions,
        "Machine": machine,
        "Bundled files": files,
        "Problems": problems,
    }
    lines = []
    for title, rows in blocks.items():
        width = max((len(name) for name, _ in rows), default=0)
        lines += [
            title,
            *("  " + f"{name:<{width}}  {shortened(v, 200)}".strip() for name, v in rows),
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _platform() -> str:
    import platform

    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype() -> str:
    from wakesleep.streams.language_model import pick_device, pick_dtype

    return pick_dtype("auto", pick_device("auto"))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, not what is built in
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _allocator_of_commands() -> str:
    """What serves `stream`, which may restart itself, when it is started as doctor was."""
    from wakesleep.streams.allocator import TUNABLES, can_tune

    environment = dict(os.environ)
    if can_tune(environment):
        environment["GLIBC_TUNABLES"] = TUNABLES
    return allocator(environment)


def _bundled(name: str) -> dict[str, Any] | None:
    from hashlib import sha256

    path = _data_folder() / name
    if not path.is_file():
        return None
    return {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}


def _document_problems(files: dict[str, Any]) -> list[str]:
    """The description of the document has the hash of its text."""
    import json
    import lzma
    from hashlib import file_digest

    if not (files["document.txt.xz"] and files["document.json"]):
        return []
    told = json.loads((_data_folder() / "document.json").read_text(encoding="utf-8"))
    try:
        with lzma.open(_data_folder() / "document.txt.xz") as text:
            intact = file_digest(text, "sha256").hexdigest() == told["sha256"]
    except (lzma.LZMAError, EOFError):
        intact = False
    return [] if intact else ["document.txt.xz is damaged; install wakesleep again"]


def _model_problems() -> list[str]:
    """The bundled model is what its own description says."""
    from wakesleep.streams.language_model import load_language_model

    try:
        load_language_model(device="cpu")
    except Refused as error:
        why = "; ".join(str(error).splitlines())
        return [f"the bundled model is damaged ({why}); install wakesleep again"]
    return []


def _data_folder() -> Path:
    return Path(__file__).resolve().parent / "data"
