"""Whole models, ours with and without its parts, as `wakesleep bench` times them.

A twin without some part has the widths and layers of the given model and random weights: speed does
not depend on them. Models read the bundled document, over and over where it is too short.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wakesleep.streams.bench_attention import FullAttention, check_attention
from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_measure import Contender, Unequal
from wakesleep.streams.bench_titans import check_transformer, titans_transformer
from wakesleep.streams.documents import open_document
from wakesleep.streams.language_model import LanguageModel, load_language_model, pick_dtype
from wakesleep.streams.planting import BUNDLED
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.segments import Segment
from wakesleep.streams.token_reader import open_tokens
from wakesleep.streams.tokenizer import NUM_SPECIAL
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import StreamState

OURS, ATTENTION, MAC = "ours", "full attention", "titans-pytorch MAC"
WITHOUT = {  # the last one is a plain transformer with a sliding window
    OURS: (),
    "no store": ("store_layers",),
    "no memory": ("memory_layers",),
    "window only": ("memory_layers", "store_layers", "fast_layers"),
}
ATTENTION_CALL = 256  # tokens of a turn of full attention behind a long context
TAIL = 16  # tokens that the check of decoding reads one by one, over the end of a chunk
TOLERANCE = 1e-9  # of float64 logits


class Reader(NamedTuple):
    """A model of the bench, and how it is read: runner and the segments that come next."""

    language_model: LanguageModel
    runner: StreamRunner
    segments: Iterator[Segment]

    def read(self, num_tokens: int) -> None:
        """Read at least so many tokens."""
        done = 0
        while done < num_tokens:
            segment = next(self.segments)
            self.runner.read(segment)
            done += len(segment.ids)


def open_reader(config: BenchConfig, name: str, dtype: str | None = None) -> Reader:
    """A model that has read nothing; `name` is one of `WITHOUT`."""
    dtype = dtype or pick_dtype(config.dtype, torch.device("cpu"))
    given = load_language_model(config.model, dtype=dtype, device="cpu")
    language_model = without(given, WITHOUT[name])
    segments = document_segments(language_model, config.tokens)
    return Reader(language_model, StreamRunner(language_model), segments)


def without(language_model: LanguageModel, keys: tuple[str, ...]) -> LanguageModel:
    """The same model if there are no `keys`, else a random one whose lists of layers are empty."""
    given = language_model.model
    if not keys:
        return language_model
    config = dataclasses.replace(given.config, **dict.fromkeys(keys, ()))
    model = TTLModel(config).to(given.embedding.weight.dtype).eval()
    return language_model._replace(model=model.requires_grad_(False))


def document_segments(language_model: LanguageModel, length: int) -> Iterator[Segment]:
    """Segments of `length` tokens of the bundled document, for ever."""
    while True:
        reader = open_tokens(open_document(str(BUNDLED)), language_model.tokenizer)
        while len(ids := reader.read(length).astype(np.int64)) == length:
            yield Segment(ids, ids >= NUM_SPECIAL)


def fill_len(config: ModelConfig) -> int:
    """Tokens after which window and store are full."""
    return config.window + config.chunk + config.store.capacity


def streaming_model(config: BenchConfig, name: str, context: int) -> Contender:
    """Read the document as `wakesleep stream` does, a segment per turn, with a full store.

    Args:
        context: tokens that full attention looks back on; ours and its twins do not need it.
    """
    if name == ATTENTION:
        return _attention(config, context, min(ATTENTION_CALL, config.tokens))
    reader = open_reader(config, name)
    reader.read(fill_len(reader.language_model.model.config))

    def turn() -> Tensor:
        reader.read(config.tokens)
        return reader.runner.carried.logits

    facts = {"state_bytes": reader.runner.state_bytes}
    return Contender(config.tokens, turn, _cuts(reader.language_model, config.seed), facts)


def decoding_model(config: BenchConfig, name: str, position: int) -> Contender:
    """Read token by token, from the same state in every turn."""
    if name == ATTENTION:
        return _attention(config, position, 1)
    reader = open_reader(config, OURS)
    model, state = reader.language_model.model, _state_at(reader, position)
    ids = torch.from_numpy(next(reader.segments).ids)[None]
    ids = ids.repeat(1, -(-config.decode_len // ids.shape[1]))[:, : config.decode_len]

    @torch.inference_mode()
    def turn() -> Tensor:
        now, ready = state, None
        for token in ids.split(1, 1):
            logits, now, stats = model(token, now, ready=ready)
            ready = stats.ready
        return logits

    check = _cuts(reader.language_model, config.seed, by_token=True)
    return Contender(config.decode_len, turn, check)


def one_shot_model(config: BenchConfig, name: str, length: int) -> Contender:
    """Read `length` tokens in one call, having read nothing before."""
    if name == ATTENTION:
        return _attention(config, 0, length)
    reader = open_reader(config, name)
    model = reader.language_model.model
    ids = np.concatenate([next(reader.segments).ids for _ in range(-(-length // config.tokens))])
    tokens = torch.from_numpy(ids)[None, :length]

    @torch.inference_mode()
    def turn() -> Tensor:
        return model(tokens, model.init_state(1))[0]

    return Contender(length, turn, _cuts(reader.language_model, config.seed))


def mac_model(config: BenchConfig, name: str, decode: bool) -> Contender:
    """Ours or titans-pytorch's MAC transformer: one long call, or tokens behind it, in float32."""
    reader = open_reader(config, OURS, "float32")
    draw = torch.Generator().manual_seed(config.seed)
    model, length = reader.language_model.model, config.prefill_len
    ids = torch.randint(
        NUM_SPECIAL, model.config.vocab_size, (1, length + config.decode_len), generator=draw
    )
    read = _read_ours if name == OURS else _read_mac
    if name == OURS:
        check = _cuts(reader.language_model, config.seed, by_token=decode)
    else:
        theirs, sizes = titans_transformer(model.config), model.config

        def check() -> str:
            return check_transformer(theirs, sizes, config.seed)

        model = theirs
    with torch.inference_mode():
        before = read(model, ids, 0, length, None)[1] if decode else None

    @torch.inference_mode()
    def turn() -> Tensor:
        if not decode:
            return read(model, ids, 0, length, None)[0]
        carried = before
        for start in range(length, length + config.decode_len):
            logits, carried = read(model, ids, start, start + 1, carried)
        return logits

    return Contender(config.decode_len if decode else length, turn, check)


def _read_ours(model: TTLModel, ids: Tensor, start: int, end: int, carried):
    state, ready = carried or (model.init_state(1), None)
    logits, state, stats = model(ids[:, start:end], state, ready=ready)
    return logits, (state, stats.ready)


def _read_mac(model, ids: Tensor, start: int, end: int, carried):
    """It is given all ids up to the end, also where it looks at the last one alone."""
    return model(ids[:, :end], cache=carried, return_cache=True)


def _attention(config: BenchConfig, context: int, length: int) -> Contender:
    """Full attention that reads `length` tokens behind `context` others; 1: token by token."""
    dtype = pick_dtype(config.dtype, torch.device("cpu"))
    sizes = load_language_model(config.model, dtype=dtype, device="cpu").model.config
    model = FullAttention(sizes).to(getattr(torch, dtype)).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(config.seed)
    tokens = max(length, config.decode_len) if length == 1 else length
    ids = torch.randint(sizes.vocab_size, (1, tokens), generator=draw)
    cache = model.make_cache(context, tokens)

    @torch.inference_mode()
    def turn() -> Tensor:
        cache.num_read = context
        for part in ids.split(length, 1):
            logits = model(part, cache)
        return logits

    def check() -> str:
        return check_attention(model, config.seed)

    return Contender(tokens, turn, check, {"state_bytes": cache.kv.nbytes})


def _state_at(reader: Reader, position: int) -> StreamState:
    """The state after `position` tokens: once window and store are full, the position is set.

    Nothing but the position grows with a stream.
    """
    config = reader.language_model.model.config
    reader.read(min(position, fill_len(config)))
    state = reader.runner.state
    far = max(0, position - int(state.position)) // config.chunk * config.chunk
    return state._replace(position=state.position + far)


def _cuts(language_model: LanguageModel, seed: int, by_token: bool = False):
    """The check of a model of ours; see `check_cuts`."""
    return lambda: check_cuts(language_model.model, seed, by_token)


def check_cuts(model: TTLModel, seed: int, by_token: bool) -> str:
    """See that any cut into calls gives the logits of one call in the slow form, in float64.

    The slow form is the one with gradients: it moves no pair of the store. Window and store are as
    small as they can be, so that both overflow.

    Raises:
        Unequal: it gives something else.
    """
    chunk = model.config.chunk
    exact = TTLModel(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, 4 * chunk + TAIL // 2), generator=draw)
    sizes = {"window": chunk, "capacity": chunk}
    whole, _, _ = exact(ids, exact.init_state(1, **sizes))
    state, ready, pieces = exact.init_state(1, **sizes), None, []
    parts = ids.split(chunk * 3 // 2 + 1, 1)
    if by_token:
        parts = (ids[:, :-TAIL], *ids[:, -TAIL:].split(1, 1))
    with torch.inference_mode():
        for part in parts:
            logits, state, stats = exact(part, state, ready=ready)
            ready = stats.ready
            pieces.append(logits)
    deviation = float((torch.cat(pieces, 1) - whole.detach()).abs().max())
    if not deviation <= TOLERANCE:
        raise Unequal(f"cut into calls, logits are {deviation:.1e} from those of one call")
    how = "token by token" if by_token else "in pieces"
    return f"{how} as in one call by the slow form in float64, within {deviation:.0e}"
