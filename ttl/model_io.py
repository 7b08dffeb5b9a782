"""Model folders: `config.json`, `model.safetensors`, `tokenizer.json` and the card `README.md`.

A folder may come from a stranger. `config.json` is read first; it holds the fields of the config,
and size and SHA-256 of the two other files. No file names a class or contains code, and nothing is
allocated before the header of `model.safetensors` agrees with the config. The weights carry the
hash of the config, so that the hash of `model.safetensors` alone says which model it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from wakesleep.ttl.config_json import config_from_json, config_to_json, parse_json
from wakesleep.ttl.files import open_regular, sha256_of, write_atomically
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import nbytes
from wakesleep.ttl.tensor_file import Expected, read_tensors

SCHEMA = 1
CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
MAX_CONFIG_BYTES = 1 << 16
MAX_BYTES = {WEIGHTS: 1 << 34, TOKENIZER: 1 << 24}
MAX_STATE_BYTES = 1 << 32  # of one lane; a config that asks for more would fail at the first token


def save_model(
    folder: str | Path,
    model: TTLModel,
    tokenizer_json: bytes,
    card: str,
    half: bool = True,
) -> str:
    """Write a model folder; return the SHA-256 of its weights file.

    Each file is replaced atomically, `config.json` last: a crash in between leaves a folder that
    `load_model` refuses, never one that it misreads.

    Args:
        half: store the weights as float16 (3 significant digits) instead of float32.

    Raises:
        ValueError: a weight that is not finite, or too large for float16.
    """
    from safetensors.torch import save

    config = config_to_json(model.config)
    tensors = {name: _packed(name, tensor, half) for name, tensor in _weights(model)}
    files = {
        WEIGHTS: save(tensors, metadata={"config_sha256": _config_sha256(config)}),
        TOKENIZER: tokenizer_json,
    }
    record = {
        "schema": SCHEMA,
        "model": config,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    files[CARD] = card.encode()
    files[CONFIG] = json.dumps(record, indent=2).encode() + b"\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(folder / name, data)
    return record["files"][WEIGHTS]["sha256"]


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> TTLModel:
    """Read a model folder into a model in evaluation mode, on the CPU; draws no random number.

    Raises:
        ValueError: a file is missing, a link, of another size or hash than recorded; the config has
            an unknown key or a value beyond its bounds; the weights do not fit the config.
    """
    folder = Path(folder)
    record = _read_record(folder)
    config = config_from_json(ModelConfig, record["model"], f"{CONFIG}: model")
    with torch.device("meta"):  # shapes alone
        plan = TTLModel(config)
        state_bytes = nbytes(plan.init_state(1))
    if state_bytes > MAX_STATE_BYTES:
        raise ValueError(
            f"{folder}: the state of one stream would take {state_bytes:,} bytes; "
            f"at most {MAX_STATE_BYTES:,} are allowed. Choose a smaller window or store."
        )
    with _open_recorded(folder, record, TOKENIZER):
        pass
    with _open_recorded(folder, record, WEIGHTS) as file:
        expected = {name: _expected(tensor) for name, tensor in _weights(plan)}
        tensors, metadata = read_tensors(file, expected, str(folder / WEIGHTS))
    if metadata.get("config_sha256") != _config_sha256(record["model"]):
        raise ValueError(f"{folder / CONFIG} is not the config that {WEIGHTS} was saved with")
    with torch.random.fork_rng(devices=[]):
        model = TTLModel(config).to(dtype)
    with torch.no_grad():
        for name, tensor in _weights(model):
            tensor.copy_(tensors[name])
    return model.eval()


def model_sha256(folder: str | Path) -> str:
    """Return the name of the model in a folder: the recorded SHA-256 of its weights file.

    Raises:
        ValueError: `config.json` is missing, a link, or broken.
    """
    return _read_record(Path(folder))["files"][WEIGHTS]["sha256"]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that is saved, by name; of weights that are tied, the first name alone."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _packed(name: str, tensor: Tensor, half: bool) -> Tensor:
    """The tensor as it is stored."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor.contiguous()
    tensor = tensor.to(torch.float16 if half else torch.float32)
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name} has values that are not finite{' in float16' if half else ''}; "
            f"nothing was written{'. Save with half=False, or look at the training' * half}"
        )
    return tensor.contiguous()


def _expected(tensor: Tensor) -> Expected:
    """What a weights file may hold in the place of `tensor`."""
    floats = [torch.float16, torch.float32]
    return Expected(tuple(tensor.shape), floats if tensor.is_floating_point() else [tensor.dtype])


def _config_sha256(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _is_sha256(text: Any) -> bool:
    return type(text) is str and re.fullmatch("[0-9a-f]{64}", text) is not None


def _read_record(folder: Path) -> dict[str, Any]:
    """`config.json`, with every part of its form checked but the fields of the config."""
    path = folder / CONFIG
    with open_regular(path, MAX_CONFIG_BYTES) as file:
        record = parse_json(file.read(), str(path))
    if type(record) is not dict or record.get("schema") != SCHEMA:
        found = record.get("schema") if type(record) is dict else record
        raise ValueError(f"{path} has schema {str(found)[:60]}; this version reads {SCHEMA}")
    files = record.get("files")
    if set(record) != {"schema", "model", "files"} or type(files) is not dict:
        raise ValueError(f"{path} must hold schema, model and files, and nothing else")
    if set(files) != set(MAX_BYTES):
        raise ValueError(f"{path}: files must name {sorted(MAX_BYTES)}, and nothing else")
    for name, entry in files.items():
        whole = type(entry) is dict and set(entry) == {"bytes", "sha256"}
        if not whole or type(entry["bytes"]) is not int or not _is_sha256(entry["sha256"]):
            raise ValueError(f"{path}: files.{name} must hold bytes and sha256")
    return record


@contextlib.contextmanager
def _open_recorded(folder: Path, record: dict[str, Any], name: str) -> Iterator[BinaryIO]:
    """Open a file of the folder if its size, then its hash, are the recorded ones."""
    entry = record["files"][name]
    with open_regular(folder / name, MAX_BYTES[name]) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise ValueError(f"{folder / name} has {size:,} bytes; recorded are {entry['bytes']:,}")
        if sha256_of(file) != entry["sha256"]:
            raise ValueError(f"{folder / name} was changed: its SHA-256 is not the recorded one")
        yield file
