"""The attention kernel: interpreted against the PyTorch form, and compiled for two GPUs."""

import pytest
import torch

from wakesleep.kernels.softmax_read_triton import launch, softmax_read_kernel

# Bytes of stack per thread that are known and accepted, by dtype and head width.
STACK = {(torch.float32, 128): 64}


def shipped(dtype, K, bias):
    """A chunk of 8 lanes with 3 heads in front of a full store, without memory behind it."""
    B, H, C, near, places, R = 8, 3, 64, 321, 3072, K // 4

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, v = empty(B, H, C, R + K), empty(B, H, places, K)
    keys = empty(B, H, near + places + 64, R + K)[:, :, : near + places]
    if bias:
        bias = empty(B, 1, C if bias == "query" else 1, near + places)
        bias = bias.expand(B, H, C, -1)
    out, sink = empty(B, H, C, K), empty(H)
    return launch(out, q, keys, empty(B, H, near, K), v, sink, near - C, bias)


def test_the_interpreted_kernel_equals_the_pytorch_form(interpret):
    interpret("softmax_read.py")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "K", "bias"),
    [(torch.bfloat16, 64, "place"), (torch.bfloat16, 64, "query"), (torch.bfloat16, 128, None),
     (torch.float32, 64, "place"), (torch.float32, 128, None)],
)  # fmt: skip
def test_the_compiled_kernel_fits_the_gpu(capability, dtype, K, bias, compile_ahead):
    _, args, options = shipped(dtype, K, bias)
    used = compile_ahead(capability, softmax_read_kernel, args, options)
    print(capability, dtype, K, bias, used)
    assert used.shared <= 101_376  # of the smallest GPU with the same instructions, sm_86
    assert used.stack <= STACK.get((dtype, K), 0)
    assert used.registers <= 255
    # A tile of 32 queries is too small for sm_90's own instruction, of which one takes 64.
    assert used.wgmma if capability == 90 and dtype == torch.bfloat16 else used.mma
