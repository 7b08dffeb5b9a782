"""Files of tensors that may come from a stranger: everything is checked before it is allocated.

The format is safetensors: 8 bytes with the length of a JSON header, the header with the dtype,
shape and byte range of every tensor, then the numbers. The header is read here, so that it can be
compared with what the model expects while the numbers are still on the disk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from wakesleep.ttl.config_json import parse_json

MAX_HEADER_BYTES = 1 << 20
ITEM_BYTES = {"BOOL": 1, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class Expected(NamedTuple):
    """What the header must say of one tensor."""

    shape: tuple[int, ...]
    dtypes: Collection[torch.dtype]  # any of these


def read_tensors(
    file: BinaryIO, expected: Mapping[str, Expected], where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of an open safetensors file and its metadata.

    Raises:
        ValueError: the header is broken, or says anything else than `expected`, or the file has
            another length than the header. Nothing is allocated then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = os.fstat(file.fileno()).st_size
    header, start = _read_header(file, size, where)
    metadata = header.pop("__metadata__", {})
    if set(header) != set(expected):
        odd = min(set(header) ^ set(expected))
        raise ValueError(f"{where}: tensor {odd!r} is {'unknown' if odd in header else 'missing'}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1], where)):
        _check_entry(name, entry, expected[name], where)
        begin, stop = _offsets(entry, where)
        length = math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
        if begin != end or stop - begin != length:
            raise ValueError(f"{where}: tensor {name!r} has a wrong byte range")
        end = stop
    if start + end != size:
        raise ValueError(f"{where} has {size:,} bytes; its header stands for {start + end:,}")
    file.seek(0)
    try:
        return load(file.read()), metadata
    except SafetensorError as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from error


def _read_header(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the first number."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"{where} is not a safetensors file, or it was cut off")
    header = parse_json(file.read(length), f"the header of {where}")
    if type(header) is not dict or not all(type(entry) is dict for entry in header.values()):
        raise ValueError(f"{where}: the header is not a table of tensors")
    return header, 8 + length


def _offsets(entry: dict[str, Any], where: str) -> list[int]:
    offsets = entry.get("data_offsets")
    if type(offsets) is not list or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"{where}: the header has a tensor without a byte range")
    return offsets


def _check_entry(name: str, entry: dict[str, Any], expected: Expected, where: str) -> None:
    if entry.get("shape") != list(expected.shape):
        raise ValueError(
            f"{where}: tensor {name!r} has the shape {str(entry.get('shape'))[:60]}; "
            f"the config says {list(expected.shape)}"
        )
    dtypes = [DTYPE_NAMES[dtype] for dtype in expected.dtypes]
    if entry.get("dtype") not in dtypes:
        raise ValueError(
            f"{where}: tensor {name!r} is {str(entry.get('dtype'))[:60]}; expected {dtypes}"
        )
