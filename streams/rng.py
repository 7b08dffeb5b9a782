"""The global random states of torch, numpy and Python as plain values, for checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_states() -> dict[str, Any]:
    """All global states, in types that load without pickle's classes."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global one is what is meant)
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Put back what `rng_states` gave."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
