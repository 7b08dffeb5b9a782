"""Short causal convolution over tokens, with the last inputs carried from call to call.

Shapes: B lanes, T tokens of the call, D channels, R taps minus one.
Source: the depthwise convolution after the projections of Titans, arXiv 2501.00663, section 4.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def short_convolution(
    x: Tensor, weight: Tensor, tail: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps: y_t = sum_j weight[:, j] x_{t-R+j}.

    Rows of x at and after a lane's length are padding: they never reach the new tail, and their y
    means nothing. The product is taken in x's dtype; the tail keeps its own.

    Args:
        x: [B, T, D], T >= 0 (shorter than R is fine).
        weight: [D, R + 1], the last tap belongs to the token itself.
        tail: [B, R, D], inputs before the call, oldest first; zeros before the first token.
        lengths: [B] int64, 0 to T.

    Returns:
        y [B, T, D] and the tail after the call [B, R, D].
    """
    B, _, D = x.shape
    if weight.shape[0] != D or tail.shape != (B, weight.shape[1] - 1, D):
        raise ValueError(
            f"weight [D, R + 1] and tail [B, R, D] must fit x {tuple(x.shape)}, got "
            f"{tuple(weight.shape)} and {tuple(tail.shape)}; take the tail of this module's state"
        )
    R = tail.shape[1]
    past = torch.cat([tail.to(x.dtype), x], 1)  # [B, R + T, D]
    taps = weight.to(x.dtype).t().contiguous()  # [R + 1, D]
    # A compiler takes no function with a backward pass of its own, and needs none.
    y = (_shifted_sum if torch.compiler.is_compiling() else _Taps.apply)(past, taps)
    last = lengths[:, None] + torch.arange(R, device=x.device)  # rows of `past` that stay
    tail = past.gather(1, last[:, :, None].expand(B, R, D)).to(tail.dtype)
    return y, tail


def _shifted_sum(past: Tensor, taps: Tensor) -> Tensor:
    """Sum over the taps [R + 1, D] of shifted views of past [B, R + T, D]: [B, T, D].

    Channels last, they beat a grouped conv1d on a CPU: no transpose, no im2col.
    """
    T = past.shape[1] - len(taps) + 1
    y = past[:, :T] * taps[0]
    for j in range(1, len(taps)):
        y.addcmul_(past[:, j : j + T], taps[j])
    return y


class _Taps(torch.autograd.Function):
    """`_shifted_sum`; autograd would fill a gradient of all of `past` for each tap, and add up."""

    @staticmethod
    def forward(ctx: Any, past: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(past, taps)
        return _shifted_sum(past, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        past, taps = ctx.saved_tensors
        d_past, d_taps = torch.zeros_like(past), torch.empty_like(taps)
        for j in range(len(taps)):
            shifted = slice(j, j + dy.shape[1])
            d_past[:, shifted].addcmul_(dy, taps[j])
            d_taps[j] = (dy * past[:, shifted]).sum((0, 1))
        return d_past, d_taps
