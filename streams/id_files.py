"""Files of token ids, as `scripts/build_corpus.py` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from wakesleep.streams.errors import Refused


def map_ids(path: str | Path, key: str) -> np.ndarray:
    """Map a .npy file of whole numbers, a row of them; pages are read as they are needed.

    Args:
        key: the setting that names it.

    Raises:
        Refused: there is no such file, or it is another kind of file.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise Refused(f"{key}: {path}: no such file") from error
    except (OSError, ValueError, EOFError) as error:  # numpy's own words would speak of pickles
        remedy = "scripts/build_corpus.py makes one of texts"
        raise Refused(f"{key}: {path} is no .npy file of token ids", "", remedy) from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise Refused(f"{key}: {path}: expected a row of ids, got {ids.dtype} {ids.shape}")
    return ids


def ids_sha256(ids: np.ndarray) -> str:
    """The hash of some ids, whatever whole numbers they are kept as."""
    digest, step = hashlib.sha256(), 1 << 20
    for start in range(0, len(ids), step):
        digest.update(np.ascontiguousarray(ids[start : start + step], dtype="<u4"))
    return digest.hexdigest()


def fingerprint(hashes: Iterable[str]) -> str:
    """One hash for several, in their order."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
