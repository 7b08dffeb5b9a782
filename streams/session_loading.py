"""Bring a session from its folder into memory, once everything about it was checked."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wakesleep.streams.config import as_dict, flat, load_config
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import (
    LanguageModel,
    load_language_model,
    pick_device,
    pick_dtype,
)
from wakesleep.streams.manifest import Manifest
from wakesleep.streams.runner import Carried, StreamRunner, capacity_of, on_meta, to_device
from wakesleep.streams.sleeping import check_sleep
from wakesleep.streams.snapshot import read_snapshot
from wakesleep.streams.stream_config import FIXED_KEYS, StreamConfig
from wakesleep.ttl.resize import resize_state


class Loaded(NamedTuple):
    """A session in memory."""

    config: StreamConfig
    manifest: Manifest | None  # None: it is new
    language_model: LanguageModel
    runner: StreamRunner
    saved: Carried | None  # what the manifest's state file holds, if that is the runner's
    notes: list[str]  # what people should know, a line each


def load_session(
    folder: Path,
    manifest: Manifest | None,
    options: Mapping[str, Any] | Iterable[str],
    model: str | Path | LanguageModel | None = None,
) -> Loaded:
    """Load model and state; `options` go over the session's keys.

    Raises:
        Refused: an impossible option, another value of a fixed key, another model, a damaged file.
    """
    if isinstance(model, str | Path):
        options = {**dict(options), "model": str(model)}
    session = as_dict(manifest.config) if manifest else None
    config, origins = load_config(StreamConfig, overrides=options, session=session)
    if manifest is not None:
        config = _keep_fixed(manifest.config, config)
        _check_fixed(manifest.config, config, origins)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not isinstance(model, LanguageModel):
        dtype = pick_dtype(config.dtype, pick_device(config.device))
        model = load_language_model(config.model, dtype=dtype, device=config.device)
    check_sleep(config.sleep, model.model)
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=dtype)
    elif config.dtype != dtype:
        raise Refused(f"the model was loaded as {dtype}, the session has dtype={config.dtype}")
    path = None if config.model is None else str(Path(config.model).absolute())
    config = dataclasses.replace(config, model=path)
    if manifest is None:
        keep_ids = config.lanes == 1 if config.keep_ids is None else config.keep_ids
        config = dataclasses.replace(config, threads=torch.get_num_threads(), keep_ids=keep_ids)
        sizes = {"window": config.window, "capacity": config.store.capacity}
        runner = StreamRunner(model, lanes=config.lanes, budget=config.sleep.bucket, **sizes)
        return Loaded(config, None, model, runner, None, [])
    _check_model(manifest, model)
    notes = _differences(manifest, config, model)
    runner = _load_runner(folder, manifest, model)
    runner.budget = config.sleep.bucket
    saved = runner.carried
    _resize(runner, config)
    unchanged = runner.carried is saved
    return Loaded(config, manifest, model, runner, saved if unchanged else None, notes)


def environment_of(language_model: LanguageModel) -> str:
    """What else decides the last bits of a result: torch, the machine's kind, the device."""
    device = next(language_model.model.parameters()).device.type
    return f"torch {torch.__version__}, {platform.system()} {platform.machine()}, {device}"


def _keep_fixed(old: StreamConfig, new: StreamConfig) -> StreamConfig:
    """The session's own value of every fixed key that is left open."""
    before, now = flat(old), flat(new)
    left_open = [key for key in FIXED_KEYS if now[key] in (None, "auto")]
    kept = {key: before[key] for key in left_open if before[key] is not None}
    facts = {key.removeprefix("facts."): kept.pop(key) for key in [*kept] if "." in key}
    return dataclasses.replace(new, **kept, facts=dataclasses.replace(new.facts, **facts))


def _check_fixed(old: StreamConfig, new: StreamConfig, origins: Mapping[str, str]) -> None:
    before, now = flat(old), flat(new)
    for key in FIXED_KEYS:
        given = origins[key] not in ("default", "session")
        if given and now[key] != before[key]:
            raise Refused(
                f"{key}={now[key]} is given, the session has {key}={before[key]}",
                "",
                "leave it out, or use another --session",
            )


def _check_model(manifest: Manifest, language_model: LanguageModel) -> None:
    hashes = {
        "model": (language_model.model_sha256, manifest.model_sha256),
        "tokenizer": (language_model.tokenizer.sha256, manifest.tokenizer_sha256),
    }
    for what, (given, recorded) in hashes.items():
        if given != recorded:
            raise Refused(
                f"the session was made with another {what}",
                f"SHA-256 {recorded[:16]} in session.json, {given[:16]} in the model folder",
                "name the session's model with model=DIR, or use another --session",
            )


def _differences(
    manifest: Manifest, config: StreamConfig, language_model: LanguageModel
) -> list[str]:
    """Say in one line what keeps a resumed stream from being the same to the last bit."""
    old = manifest.config
    pairs = {
        "threads": (manifest.threads, torch.get_num_threads()),
        "segment_len": (old.segment_len, config.segment_len),
        "environment": (manifest.environment, environment_of(language_model)),
    }
    changed = [f"{name} was {a}, is {b}" for name, (a, b) in pairs.items() if a != b]
    last = manifest.documents[-1] if manifest.documents else None
    if last is not None and last.finished and not last.ended:
        limit, per = old.limit_tokens, old.segment_len
        if config.limit_tokens > limit and last.tokens % per:
            changed.append(f"limit_tokens was {limit:,}, no multiple of segment_len={per:,}")
    if not changed:
        return []
    return [f"equal up to rounding, not to the last bit, from here on: {'; '.join(changed)}"]


def _load_runner(folder: Path, manifest: Manifest, language_model: LanguageModel) -> StreamRunner:
    """The runner at the manifest's snapshot, in the sizes that it was saved with."""
    carried = read_snapshot(folder, on_meta(language_model, manifest.config), manifest)
    counts = {manifest.tokens, manifest.meters.total.tokens}
    if manifest.config.lanes == 1:  # more lanes forget at the ends of documents
        counts.add(int(carried.stream.position[0]))
    if len(counts) > 1:
        raise Refused(f"the session in {folder} cannot be used", "its token counts do not agree")
    device = next(language_model.model.parameters()).device
    return StreamRunner(language_model, to_device(carried, device), manifest.meters)


def _resize(runner: StreamRunner, config: StreamConfig) -> None:
    """Give the state the window and the capacity that are asked for."""
    model = runner.language_model.model
    window = config.window or model.config.window
    capacity = config.store.capacity or model.config.store.capacity
    same = window == model.window_of(runner.state) and capacity_of(runner.state) in (None, capacity)
    if not same:
        with torch.inference_mode():
            stream = resize_state(model, runner.state, window=window, capacity=capacity)
        runner.carried = runner.carried._replace(stream=stream)
