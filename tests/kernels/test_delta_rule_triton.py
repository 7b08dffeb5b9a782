"""The delta rule's kernels: interpreted against the PyTorch form, and compiled for two GPUs."""

import pytest
import torch

from wakesleep.kernels.delta_rule_triton import COLUMNS, launches

STACK = {  # bytes per thread that are known and accepted, with triton 3.7 and 3.9
    ("delta_solve_kernel", 80): 224,
    ("delta_solve_kernel", 90): 16,
    ("delta_scan_kernel", 80): 16,
    ("delta_scan_kernel", 90): 32,
}


def shipped():
    """16 chunks of 8 lanes with 3 heads, as a model with fast weights written awake has them."""
    N, B, H, C, K = 16, 8, 3, 64, 64
    X = B * H

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, state, gates = empty(N, X, C, K), empty(X, K, K), empty(N, X, C)
    flags = empty(N, B, C, dtype=torch.bool), empty(N, B, dtype=torch.bool)
    squares = empty(K // COLUMNS, N, X, C)
    return launches(tokens, state, squares, *[tokens] * 3, state, gates, gates, *flags)


def test_the_interpreted_kernels_equal_the_pytorch_form(interpret):
    interpret("delta_rule.py")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", [0, 1], ids=["solve", "scan"])
def test_the_compiled_kernels_fit_the_gpu(capability, number, compile_ahead):
    kernel, _, args, options = shipped()[number]
    used = compile_ahead(capability, kernel, args, options)
    print(capability, kernel.__name__, used)
    assert used.shared <= 101_376  # of the smallest GPU with the same instructions, sm_86
    assert used.stack <= STACK.get((kernel.__name__, capability), 0)
    assert used.registers <= 255
    assert used.wgmma if capability == 90 else used.mma
