"""Restart the command once with a memory allocator that keeps its pages (Linux with glibc).

By default glibc gives large blocks back to the system and asks for fresh, zeroed pages again at
the next tensor; a model that is called ten thousand times spends a good part of its time there.
The settings of glibc are read when a process starts, so the process replaces itself: same process
id, same arguments, before torch is loaded. `WAKESLEEP_MALLOC=default` leaves everything as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

TUNABLES = (
    "glibc.malloc.hugetlb=1"  # ask for huge pages
    ":glibc.malloc.mmap_threshold=34359738368"  # 32 GiB: no block gets pages of its own
    ":glibc.malloc.trim_threshold=34359738368"  # and none goes back
)


def restart_with_tuned_malloc() -> None:
    """Replace this process by itself with `TUNABLES` set; return where that is of no use."""
    if not sys.executable or not can_tune(os.environ):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # a system that forbids it runs slower, and runs
        return


def can_tune(environment: Mapping[str, str]) -> bool:
    """Tell whether glibc serves this process and nobody has chosen its allocator already."""
    return _has_glibc() and allocator(environment) == "glibc, default settings"


def allocator(environment: Mapping[str, str]) -> str:
    """Name what serves the memory of a process that was started with `environment`."""
    if "malloc" in environment.get("LD_PRELOAD", "") + environment.get("DYLD_INSERT_LIBRARIES", ""):
        return "preloaded: " + (
            environment.get("LD_PRELOAD") or environment["DYLD_INSERT_LIBRARIES"]
        )
    if environment.get("WAKESLEEP_MALLOC") == "default":
        return "left alone (WAKESLEEP_MALLOC=default)"
    if environment.get("GLIBC_TUNABLES") == TUNABLES:
        return "glibc, keeps its pages"
    if "GLIBC_TUNABLES" in environment:
        return "glibc, GLIBC_TUNABLES of your own"
    return "glibc, default settings" if _has_glibc() else "the system's"


def _has_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION").startswith("glibc")
    except (AttributeError, ValueError):  # no confstr (Windows), no such name (macOS, musl)
        return False
