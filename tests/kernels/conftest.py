"""Proof of Triton kernels without a GPU: the interpreter, and compilation ahead of time.

Triton decides at import whether kernels are interpreted, so those tests run in a pytest of their
own, one for each file of tests/kernels/interpreted/, and the others here compile.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

INTERPRETED = Path(__file__).parent / "interpreted"
GUARD = 1984.0  # exact in every dtype that is used
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
}


@pytest.fixture
def interpret(tmp_path) -> Callable[[str], None]:
    """Run a file of tests/kernels/interpreted/ under Triton's interpreter."""

    def run(name: str) -> None:
        cache = {"TRITON_CACHE_DIR": str(tmp_path)}
        environment = {**os.environ, **cache, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("WAKESLEEP_KERNELS", None)
        options = ["-q", "-p", "no:cacheprovider", "--durations=3", "-m", "not gpu"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(INTERPRETED / name)],
            cwd=INTERPRETED.parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout

    return run


class Guarded:
    """Tensors whose neighbours in memory are watched."""

    def __init__(self) -> None:
        self.bands: list[tuple[Tensor, Tensor]] = []

    def copy(self, x: Tensor, fill: float = float("nan")) -> Tensor:
        """x with `fill` around every row, every plane and itself, in other strides than its own."""
        wide = torch.full([n + 2 for n in x.shape[:-1]] + [x.shape[-1] + 16], fill).to(x.dtype)
        inside = (*(slice(1, n + 1) for n in x.shape[:-1]), slice(8, 8 + x.shape[-1]))
        wide[inside] = x
        band = torch.ones(wide.shape, dtype=torch.bool)
        band[inside] = False
        self.bands.append((wide, band))
        return wide[inside]

    def output(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A place for results, whose surroundings `check` compares."""
        return self.copy(torch.full(shape, float("nan"), dtype=dtype), GUARD)

    def check(self) -> None:
        """Nothing was written beside an output, and nothing at all into an input's surroundings."""
        for wide, band in self.bands:
            around = wide[band]
            assert bool((around == GUARD).all() or around.isnan().all())


@pytest.fixture
def guarded() -> Guarded:
    return Guarded()


class Resources(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes per thread: what registers had no room for
    shared: int  # bytes per block
    wgmma: int  # tensor-core instructions of sm_90
    mma: int  # those of sm_80


@pytest.fixture
def compile_ahead(tmp_path, monkeypatch) -> Callable[..., Resources]:
    """Compile a kernel for a GPU that need not be here, as its launch would, and count."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default is about to change

    def compile_kernel(capability: int, kernel, args: tuple, options: dict) -> Resources:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = _specialise(kernel, args, options)
        source = ASTSource(kernel, signature, constants, attributes)
        launch = {name: options[name] for name in ("num_warps", "num_stages")}
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), launch)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        said = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
        used = dict(re.findall(r"(REG|STACK):(\d+)", said))
        products = (compiled.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync"))
        return Resources(int(used["REG"]), int(used["STACK"]), compiled.metadata.shared, *products)

    return compile_kernel


def _specialise(kernel, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that a launch with these arguments infers."""
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        aligned = True  # torch's memory starts at multiples of 64 bytes at least
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value == 1 and name not in plain:
            signature[name], constants[(i,)] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and name not in plain
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(args) :]:
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = options[name]
    return signature, constants, attributes
