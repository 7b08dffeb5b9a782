"""Activations that are computed again in the backward pass instead of being kept until then.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the same results and gradients, run twice, of which only inputs are kept.

    It must give the same results when it is called again: no random numbers, and nothing that it
    looks at may have been changed in place since.
    """
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
