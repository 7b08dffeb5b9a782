"""Save a state to one file and read it back, bit for bit.

The file is safetensors with the dotted names of ttl/state.py, so that other programs can open it;
bfloat16, which numpy does not know, is written as float32, and is the same again when it is read.
It is written here, with names in a fixed order: equal states give equal bytes, and equal hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from wakesleep.ttl.files import open_regular
from wakesleep.ttl.state import Tree, flatten, unflatten
from wakesleep.ttl.tensor_file import DTYPE_NAMES, ITEM_BYTES, Expected, read_tensors

SCHEMA = 1  # of the state's tree: names, shapes and what they mean
KIND = "wakesleep state"
MAX_STATE_BYTES = 1 << 36


def save_state(path: str | Path, state: Tree, header: Mapping[str, str]) -> None:
    """Write `state` and the texts of `header` to a new file; an existing one is replaced."""
    with open(path, "wb") as file:
        write_state(file, state, header)


def write_state(file: BinaryIO, state: Tree, header: Mapping[str, str]) -> None:
    """Write `state` to an open file; tensors go one by one, so that memory stays flat."""
    # Widest numbers first: every tensor then starts at a multiple of its own width.
    tensors = sorted(
        flatten(state).items(), key=lambda item: (-_stored(item[1].dtype).itemsize, item[0])
    )
    table: dict = {"__metadata__": {**header, "kind": KIND, "schema": str(SCHEMA)}}
    end = 0
    for name, tensor in tensors:
        dtype = DTYPE_NAMES[_stored(tensor.dtype)]
        begin, end = end, end + tensor.numel() * ITEM_BYTES[dtype]
        table[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in tensors:
        file.write(_bytes(tensor))


def load_state(path: str | Path, like: Tree) -> tuple[Tree, dict[str, str]]:
    """Read a file of `save_state` into the form of `like`, and its header.

    Args:
        like: a state whose names, shapes and dtypes the file must have; on the meta device it
            takes no memory. Its numbers are not read.

    Raises:
        ValueError: not such a file, a link to one, another schema, or other tensors than `like`.
            Nothing is allocated then.
    """
    path = Path(path)
    with open_regular(path, MAX_STATE_BYTES) as file:
        return read_state(file, like, path.name)


def read_state(file: BinaryIO, like: Tree, where: str) -> tuple[Tree, dict[str, str]]:
    """Read an open file as `load_state` does; `where` names it in errors."""
    wanted = flatten(like)
    expected = {n: Expected(tuple(t.shape), [_stored(t.dtype)]) for n, t in wanted.items()}
    tensors, header = read_tensors(file, expected, where)
    tensors = {name: t.to(wanted[name].dtype) for name, t in tensors.items()}
    found = header.pop("kind", None), header.pop("schema", None)
    if found != (KIND, str(SCHEMA)):
        raise ValueError(
            f"{where} is {str(found[0])[:40]!r} of schema {str(found[1])[:40]!r}; this version "
            f"reads {KIND!r} of schema {str(SCHEMA)!r}"
        )
    return unflatten(like, tensors), header


def _stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in the file."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().to(_stored(tensor.dtype)).contiguous()
    return memoryview(plain.view(-1).view(torch.uint8).numpy())
