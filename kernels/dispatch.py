"""Which form of an operation runs: PyTorch's or Triton's. Every choice is made here.

    WAKESLEEP_KERNELS=auto     Triton where it can be used on a CUDA device, else PyTorch (default)
    WAKESLEEP_KERNELS=torch    PyTorch
    WAKESLEEP_KERNELS=triton   Triton; what a kernel cannot take is an error. On a CPU this needs
                               Triton's interpreter (TRITON_INTERPRET=1), which is for tests: slow

The rules look at devices, dtypes, shapes and at what is asked for; no exception decides. Where a
kernel would be used but cannot be, the reason is logged once. What a kernel does not compute at all
(most gradients, probabilities) is no error in any setting: PyTorch's form does it, and says so.

This file imports no Triton: it is the file of the kernel that does, once it has been chosen.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Form = Literal["torch", "triton"]

SETTINGS = ("auto", "torch", "triton")
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
FIRST_CAPABILITY = (8, 0)  # Ampere: tensor cores for bfloat16 and for float32 cut to 19 bits


def setting() -> str:
    """WAKESLEEP_KERNELS, or auto.

    Raises:
        ValueError: it is none of the three.
    """
    wanted = os.environ.get("WAKESLEEP_KERNELS", "auto")
    if wanted not in SETTINGS:
        raise ValueError(f"WAKESLEEP_KERNELS must be auto, torch or triton, got {wanted!r}")
    return wanted


def interpreting() -> bool:
    """Whether kernels are interpreted; Triton asks once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def softmax_read_form(q: Tensor, *others: Tensor, probabilities: bool) -> Form:
    """The form of the attention over sink, window and store.

    Args:
        q: [B, H, C, R + K] widened queries.
        others: keys, then values [..., K], of the window and of the store.
        probabilities: the caller needs them, not the values alone.
    """
    width = others[-1].shape[-1]
    lacks = "attention probabilities are asked for" if probabilities else _lacks_gradient()
    obstacle = _dtype_obstacle(q, *others) or _width_obstacle(width, 128)
    return _choose("softmax_read", q.device, lacks, obstacle)


def delta_rule_form(state: Tensor, *tokens: Tensor, gated: bool) -> Form:
    """The form of the gated delta rule over the chunks of a call.

    Args:
        state: [X, K, K]; tokens: queries (if there are any), keys and values [N, X, C, K].
        gated: which tokens are written depends on the state.
    """
    lacks = "which tokens are written depends on their surprise" if gated else _lacks_gradient()
    obstacle = _dtype_obstacle(*tokens) or _width_obstacle(state.shape[-1], 64)
    if state.dtype != torch.float32:
        obstacle = f"the state is {state.dtype}, it must be float32"
    elif tokens[0].shape[-2] > 64:
        obstacle = f"chunks have {tokens[0].shape[-2]} tokens, 64 are supported"
    return _choose("delta_rule", state.device, lacks, obstacle)


def mlp_scan_form(stack: Tensor, *tokens: Tensor, gated: bool) -> Form:
    """The form of an MLP memory over the chunks of a call.

    Args:
        stack: [X, s * K, h] of its first layer; tokens: keys, values and queries (if there are
            any) [N, X, C, K].
        gated: which tokens are written depends on the memory.
    """
    lacks = "which tokens are written depends on their surprise" if gated else None
    if torch.is_grad_enabled() and torch.compiler.is_compiling():
        lacks = "gradients of a compiled model are PyTorch's"
    C, K = tokens[0].shape[-2:]
    obstacle = _dtype_obstacle(*tokens) or _width_obstacle(K, 64)
    if stack.dtype != torch.float32:
        obstacle = f"the weights are {stack.dtype}, they must be float32"
    elif C > 64:
        obstacle = f"chunks have {C} tokens, 64 are supported"
    elif stack.shape[-1] % 16:
        obstacle = f"the hidden width is {stack.shape[-1]}, it must be a multiple of 16"
    return _choose("mlp_scan", stack.device, lacks, obstacle)


def _choose(operation: str, device: torch.device, lacks: str | None, obstacle: str | None) -> Form:
    """Turn the reasons against a kernel into a choice.

    Args:
        lacks: what is asked for and the kernel does not compute; None = nothing.
        obstacle: why the kernel cannot take these tensors; None = it can.

    Raises:
        ValueError: Triton is forced and there is an obstacle.
    """
    wanted = setting()
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return "torch"
    if lacks is not None:
        _say(operation, lacks)
        return "torch"
    obstacle = _machine_obstacle(device) or obstacle
    if obstacle is None:
        return "triton"
    if wanted == "triton":
        raise ValueError(
            f"the Triton kernel of {operation} cannot be used: {obstacle}; "
            "set WAKESLEEP_KERNELS=auto to let PyTorch do what it cannot"
        )
    _say(operation, obstacle)
    return "torch"


@cache
def _say(operation: str, reason: str) -> None:
    """Log once why PyTorch's form runs where Triton's could be expected."""
    logging.getLogger("wakesleep.kernels").warning(
        "%s runs in its PyTorch form, not as a Triton kernel: %s", operation, reason
    )


@cache
def _machine_obstacle(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'wakesleep[triton]')"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}, and TRITON_INTERPRET is not 1"
    if torch.version.cuda is None:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return None


def _lacks_gradient() -> str | None:
    if torch.is_grad_enabled():
        return "gradients may be needed, and the kernel has no backward pass"
    return None


def _dtype_obstacle(*tensors: Tensor) -> str | None:
    """All of one dtype that the kernels multiply, and autocast would not change it."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        return f"tensors have different dtypes: {sorted(map(str, dtypes))}"
    (dtype,) = dtypes
    if dtype not in HALF_OR_SINGLE:
        return f"tensors are {dtype}; float32, float16 and bfloat16 are supported"
    if dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    if torch.is_autocast_enabled(tensors[0].device.type):
        return "autocast is on"
    return None


def _width_obstacle(width: int, largest: int) -> str | None:
    if width & (width - 1) or not 16 <= width <= largest:
        return f"heads are {width} wide; powers of two from 16 to {largest} are supported"
    return None
