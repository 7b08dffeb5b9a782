"""A model folder, loaded: the network, its tokenizer, and when an answer of its counts as known."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from wakesleep.streams.errors import Refused
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.ttl.config_json import parse_json
from wakesleep.ttl.files import open_regular
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import CONFIG, TOKENIZER, load_model, model_sha256

DEFAULT = Path(__file__).parent / "data" / "default"  # the model that is shipped
THRESHOLD = "known.json"  # {"known_threshold": 0.4}, chosen on validation data; may be missing
CPU_INFO = Path("/proc/cpuinfo")
BF16_UNITS = {"avx512_bf16", "amx_bf16"}  # as Linux names them
KNOWN_THRESHOLD = 0.5  # of a model for which none was chosen


class LanguageModel(NamedTuple):
    model: TTLModel
    tokenizer: Tokenizer
    model_sha256: str
    known_threshold: float = KNOWN_THRESHOLD  # least confidence of an answer that counts


def load_language_model(
    folder: str | Path | None = None, *, dtype: str = "float32", device: str = "auto"
) -> LanguageModel:
    """Load a model folder, the shipped one if None.

    Raises:
        Refused: there is no model, or it cannot be used; the message says why.
    """
    folder = DEFAULT if folder is None else Path(folder)
    if not os.path.lexists(folder / CONFIG):
        raise Refused(
            f"{folder} holds no model", f"there is no {CONFIG}", "model=DIR names another"
        )
    try:
        model = load_model(folder, getattr(torch, dtype)).to(pick_device(device))
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        threshold = _threshold(folder)
    except ValueError as error:
        raise Refused(f"the model in {folder} cannot be used", *_first_lines(error)) from error
    if tokenizer.vocab_size != model.config.vocab_size:
        raise Refused(
            f"the model in {folder} has {model.config.vocab_size:,} tokens, "
            f"its tokenizer {tokenizer.vocab_size:,}"
        )
    return LanguageModel(model, tokenizer, model_sha256(folder), threshold)


def pick_device(name: str) -> torch.device:
    """Turn `auto` into the best device that is there, and refuse one that is not.

    Raises:
        Refused: this machine or this torch has no such device.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there[name]:
        raise Refused(f"device={name}: torch {torch.__version__} finds none here", "", "device=cpu")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> str:
    """Turn `auto` into bfloat16 on a CPU that multiplies it in hardware, else into float32.

    State that is learned stays float32. Without such units bfloat16 is slower than float32.
    """
    if name != "auto":
        return name
    has_units = CPU_INFO.exists() and BF16_UNITS & set(CPU_INFO.read_text().split())
    return "bfloat16" if device.type == "cpu" and has_units else "float32"


def _threshold(folder: Path) -> float:
    if not os.path.lexists(folder / THRESHOLD):
        return KNOWN_THRESHOLD
    with open_regular(folder / THRESHOLD, 4096) as file:
        values = parse_json(file.read(), THRESHOLD)
    threshold = values.get("known_threshold") if type(values) is dict else None
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
        raise ValueError(f"{THRESHOLD} must hold known_threshold, a number from 0 to 1")
    return float(threshold)


def _first_lines(error: ValueError) -> list[str]:
    return str(error).splitlines()[:2]
