"""What a benchmark was measured on and with, so that rows of two machines are never mixed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wakesleep.streams.allocator import allocator
from wakesleep.streams.bench_cases import PACKAGES
from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.language_model import pick_dtype

SOURCE = Path(__file__).resolve().parent.parent


def describe(config: BenchConfig) -> dict[str, Any]:
    """Processor, threads, versions, allocator, and the dtype that models are read in."""
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": config.threads or torch.get_num_threads(),
        "dtype": pick_dtype(config.dtype, torch.device("cpu")),
        "allocator": allocator(os.environ),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit_of() -> str:
    """The commit of this checkout, with a + if files were changed since; else the version."""
    if not (SOURCE / ".git").exists():
        return f"wakesleep {_version('wakesleep')}"
    git = ["git", "-C", str(SOURCE)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **_QUIET).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], **_QUIET).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"wakesleep {_version('wakesleep')}"
    return head + ("+" if changes else "")


_QUIET = {"check": True, "capture_output": True, "text": True}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
