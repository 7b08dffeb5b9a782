"""The MLP memory's kernels: interpreted against the PyTorch form, and compiled for two GPUs."""

import itertools

import pytest
import torch

from wakesleep.kernels.memory_chunk import Chunks, MLPMemory
from wakesleep.kernels.mlp_backward_triton import backward_launches
from wakesleep.kernels.mlp_scan_triton import launches, stack_bytes

STACK = {  # bytes per thread that are known and accepted, with triton 3.7 and 3.9
    ("mlp_plan_kernel", 90): 56,
    ("mlp_scan_kernel", 80): 1376,
    ("mlp_scan_kernel", 90): 736,
    ("mlp_backward_kernel", 80): 1720,
    ("mlp_backward_kernel", 90): 1120,
}
FIRST_LEVEL = 262_144  # bytes of a multiprocessor of sm_90, shared memory and cache together


def shipped():
    """16 chunks of 8 lanes with 3 heads, as the shipped model has them: the three kernels."""
    N, B, H, C, K, h = 16, 8, 3, 64, 64, 128
    X = B * H

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    base = empty(X, K, h), empty(X, h, K)
    memory = MLPMemory(C, 0.1, 8.0, base, empty(X, 1, K), empty(X, 1, K))
    tokens, gates, stacks = (
        empty(N, X, C, K),
        empty(N, X, C),
        (empty(X, 2 * K, h), empty(X, 2 * h, K)),
    )
    flags = empty(N, B, C, dtype=torch.bool), empty(N, B, dtype=torch.bool)
    chunks = Chunks(*[tokens] * 3, *[gates] * 3, *flags)
    forward = launches(tokens, gates, stacks, None, memory, chunks)
    starts = tuple(empty(N, *s.shape) for s in stacks)
    _, backward = backward_launches(memory, starts, stacks, tokens, chunks)
    return [*forward, backward[1]]


def test_the_interpreted_kernels_equal_the_pytorch_form(interpret):
    interpret("mlp_scan.py")


@pytest.mark.parametrize(
    ("number", "capability"),
    [*itertools.product((0, 1), (80, 90)), (2, 90), pytest.param(2, 80, marks=pytest.mark.slow)],
)
def test_the_compiled_kernels_fit_the_gpu(number, capability, compile_ahead):
    kernel, _, args, options = shipped()[number]
    used = compile_ahead(capability, kernel, args, options)
    print(capability, kernel.__name__, used)
    assert used.shared <= 101_376  # of the smallest GPU with the same instructions, sm_86
    assert used.stack <= STACK.get((kernel.__name__, capability), 0)
    assert used.registers <= 255
    assert used.wgmma if capability == 90 else used.mma
    if kernel.__name__ == "mlp_scan_kernel" and capability == 90:
        assert used.shared + stack_bytes(64, 128, levels=2) <= FIRST_LEVEL
        assert used.shared + stack_bytes(64, 256, levels=2) > FIRST_LEVEL  # through the second one
