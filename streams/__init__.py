"""Tokens in, results out: documents, tokenizer, runner, sessions, training, command line.

Public names are imported at first use, so that `wakesleep --help` does not load torch.
"""

from importlib import import_module

_HOME = {"Session": "wakesleep.streams.session"}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'wakesleep.streams' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
