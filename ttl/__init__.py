"""The model: window, exact store, neural memory, the block that combines them, their state.

Public names are imported at first use: what needs no torch does not load it.
"""

from importlib import import_module

_HOME = {
    "ModelConfig": "model",
    "TTLModel": "model",
    "MemoryConfig": "memory",
    "NeuralMemory": "memory",
    "StoreConfig": "store",
    "load_model": "model_io",
    "save_model": "model_io",
    "resize_state": "resize",
    "segment_flops": "flops",
    "assert_causal": "checks",
    "assert_cut_invariant": "checks",
    "assert_isolated": "checks",
    "assert_truncates": "checks",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"wakesleep.ttl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'wakesleep.ttl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
