"""Closed formulas for the cost of reading, in FLOPs and bytes: the wake half of the ledger.

`matmul` equals what torch.utils.flop_counter counts when this code reads without gradients (2 per
multiply-add of every matrix product); elementwise work is seen in seconds, not here. `linalg`
counts n^2 m per triangular solve. Costs depend on where a call falls on the chunk grid, so the
formulas take the position.

Shapes: B lanes, T tokens, D width, H heads, K head width, W window, C chunk, P page, S places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from wakesleep.ttl.attention import TAPS
from wakesleep.ttl.fast import OLD_KEYS, PROBES, hidden_width
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig
from wakesleep.ttl.state import SPAN

CALL = 2048  # tokens that are read at once in `flop_table`: some costs are those of a call


class PartCost(NamedTuple):
    """One row of the table."""

    part: str  # "window", "store", ...
    layer: int | None  # None for what belongs to no layer
    matmul: int
    linalg: int = 0


class PartBytes(NamedTuple):
    part: str
    layer: int | None
    nbytes: int


def segment_flops(
    config: ModelConfig,
    position: int,
    num_tokens: int,
    *,
    batch: int = 1,
    window: int | None = None,
    capacity: int | None = None,
    written: Sequence[int] | None = None,
    held: Sequence[int] | None = None,
    head: bool = True,
) -> list[PartCost]:
    """Cost of one call of `num_tokens` that starts at `position`, by part and layer.

    Every lane is at the same position and all its tokens are finite; what a ragged batch pads is
    not counted. The store counts as full as the tokens that left the window can make it (after a
    resize, as if the sizes had always been so). `read_weight` of a training step is not counted.

    Args:
        window, capacity: W and S of the state; the config's if None.
        written: tokens that a memory with a surprise gate writes in each chunk it works on (those
            of the call's grid, open chunks included; of MAC those of the pages that the call
            completes), the same in every lane. None counts all tokens as written: exact without a
            gate, an upper bound with one.
        held: rows of keys in each layer of fast weights that are an MLP, see `open_keys`; None =
            none in any.
        head: whether the call gives logits.
    """
    c = config
    W = c.window if window is None else window
    S = c.store.capacity if capacity is None else capacity
    tokens = batch * num_tokens
    inner = c.num_heads * c.head_dim
    rotary = c.head_dim // 4 // 2 * 2
    per_pair = 2 * batch * c.num_heads * (2 * c.head_dim + rotary)  # of a query and a key
    parts = []
    for layer in range(c.num_layers):
        paged = c.memory.page if c.combine == "mac" and layer in c.memory_layers else 0
        reads = _reads(position, num_tokens, c.chunk, paged)
        near = sum(r.queries * (1 + c.num_persistent + paged + W + r.shown) for r in reads)
        parts.append(PartCost("projections", layer, 2 * tokens * c.dim * 4 * inner))
        parts.append(PartCost("window", layer, near * per_pair))
        if layer in c.store_layers:
            used = sum(r.queries * min(S, max(0, r.number * c.chunk - W)) for r in reads)
            mass = 2 * batch * c.num_heads * (near + used) if c.store.score == "mass" else 0
            parts.append(PartCost("store", layer, used * per_pair + mass))
            if c.store.score == "learned":
                hidden = c.store.hidden * (c.dim + c.num_heads)
                parts.append(PartCost("admission", layer, 2 * tokens * hidden))
        if layer in c.fast_layers:
            rows = held[c.fast_layers.index(layer)] if held else 0
            adds, solve = _fast(c, position, num_tokens, rows)
            parts.append(PartCost("fast weights", layer, 2 * batch * adds, batch * solve))
        if layer in c.memory_layers:
            cost = _pages if paged else _memory
            adds, solve = cost(c, position, num_tokens, written)
            parts.append(PartCost("memory", layer, 2 * batch * adds, batch * solve))
        parts.append(PartCost("feed-forward", layer, 6 * tokens * c.dim * c.mlp_dim))
    if head:
        parts.append(PartCost("head", None, 2 * tokens * c.dim * c.vocab_size))
    return parts


def pass_flops(config: ModelConfig, num_tokens: int, stored: int, *, batch: int = 1) -> int:
    """FLOPs of one `sleep_pass` over num_tokens of each lane, at most (exact without gates).

    Args:
        stored: places of each store that are read, up to the last one that holds a pair.
    """
    c = replace(config, window=num_tokens, recent=0)
    queries = batch * num_tokens * c.num_heads
    per_key = 2 * queries * (2 * c.head_dim + c.head_dim // 4 // 2 * 2)
    reads = stored * (per_key + (2 * queries if c.store.score == "mass" else 0))
    return wake_flops(c, 0, num_tokens, batch=batch, head=False) + len(c.store_layers) * reads


def wake_flops(config: ModelConfig, position: int, num_tokens: int, **sizes) -> int:
    """Total of `segment_flops`, with its arguments."""
    return sum(p.matmul + p.linalg for p in segment_flops(config, position, num_tokens, **sizes))


def flop_table(config: ModelConfig) -> str:
    """MFLOP per token by part, for people: whole pages (or chunks), store and fast weights full."""
    full, tokens = _full(config)
    rows: dict[str, tuple[float, list[str]]] = {}
    for cost in segment_flops(config, full, tokens, held=most_keys(config)):
        total, layers = rows.get(cost.part, (0.0, []))
        layers = layers if cost.layer is None else [*layers, str(cost.layer)]
        rows[cost.part] = total + (cost.matmul + cost.linalg) / tokens / 1e6, layers
    whole = sum(total for total, _ in rows.values())
    stored = f" and a store of {config.store.capacity:,} pairs" if config.store_layers else ""
    lines = [f"MFLOP per token, with a window of {config.window:,}{stored}"]
    for part, (total, layers) in {**rows, "all": (whole, [])}.items():
        where = f"layer {', '.join(layers)}" if layers else ""
        lines.append(f"  {part:<12} {total:9.3f} {total / whole:7.1%}  {where}".rstrip())
    return "\n".join(lines)


def token_flops(config: ModelConfig) -> float:
    """FLOPs of reading one token, as the last line of `flop_table` has them."""
    full, tokens = _full(config)
    return wake_flops(config, full, tokens, held=most_keys(config)) / tokens


def most_keys(config: ModelConfig) -> list[int]:
    """The keys that fast weights hold at most, layer by layer."""
    most = OLD_KEYS * config.head_dim if config.fast.kind == "mlp" else 0
    return [most] * len(config.fast_layers)


def _full(config: ModelConfig) -> tuple[int, int]:
    """Position behind which the store is full, and tokens of a call: whole pages or chunks."""
    period = (config.combine == "mac" and config.memory.page) or config.chunk
    sizes = (config.window + config.store.capacity, CALL)
    full, tokens = (-(-size // period) * period for size in sizes)
    return full, tokens


def state_bytes(
    config: ModelConfig,
    *,
    batch: int = 1,
    window: int | None = None,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[PartBytes]:
    """Bytes of a state, by part and layer; they stay the same however much is read.

    Args:
        window, capacity: W and S of the state; the config's if None.
        dtype: of the model's weights.
    """
    c = config
    W = c.window if window is None else window
    S = c.store.capacity if capacity is None else capacity
    H, size = c.num_heads, dtype.itemsize
    pair = 2 * c.head_dim * size
    slot = H * (pair + 4) + 1  # key, value, score; live
    place = pair + 4 + 4 + 8 + 4 * SPAN  # score, mass, position, ids
    parts = []
    for layer in range(c.num_layers):
        tail = (TAPS - 1) * 3 * H * c.head_dim * size
        parts.append(PartBytes("window", layer, batch * ((W + c.chunk) * slot + tail)))
        if layer in c.store_layers:
            parts.append(PartBytes("store", layer, batch * H * (S * place + 3 * 4)))
        if layer in c.memory_layers:
            memory = _memory_bytes(c, max(4, size))
            if c.combine == "mac":
                memory += c.memory.page * H * pair
            parts.append(PartBytes("memory", layer, batch * memory))
        if layer in c.fast_layers:
            places = S if layer in c.store_layers else 0
            hidden = hidden_width(c.fast, c.head_dim)
            numbers = c.head_dim * 2 * (hidden or c.head_dim)  # two layers; or matrix, covariance
            numbers += 2 * c.chunk if c.fast.write == "always" else 0
            fast = max(4, size) * numbers + 8 * places + PROBES * (pair + 8)
            if hidden:
                fast += OLD_KEYS * c.head_dim * (pair // 2 + 4 + 8 + 1)
            parts.append(PartBytes("fast weights", layer, batch * H * fast))
    ids = SPAN + W + c.chunk
    parts.append(PartBytes("ids and counters", None, batch * 8 * (ids + 3)))
    if c.recent:
        parts.append(PartBytes("recent", None, batch * c.recent * (16 + c.dim * size)))
    return parts


def _chunks(position: int, num_tokens: int, chunk: int) -> range:
    """Numbers of the chunks on the grid of a call; at least one."""
    first = position // chunk
    return range(first, max(-(-(position + num_tokens) // chunk), first + 1))


class Read(NamedTuple):
    """What attention reads in one chunk."""

    number: int  # of the chunk, since the lane's reset
    queries: int
    shown: int  # slots of the chunk that its queries look at


def _reads(position: int, num_tokens: int, chunk: int, page: int) -> list[Read]:
    """The reads of a call; page: where it is cut, 0 = nowhere.

    A piece within one chunk asks for its own tokens, all others for all slots.
    """
    reads, stop = [], position + num_tokens
    while True:
        end = min(stop, (position // page + 1) * page) if page else stop
        chunks = _chunks(position, end - position, chunk)
        if len(chunks) == 1 and end > position:
            first = chunks[0] * chunk
            reads.append(Read(chunks[0], end - position, end - first))
        else:
            reads += [Read(n, chunk, chunk) for n in chunks]
        position = end
        if position == stop:
            return reads


def _shapes(config: MemoryConfig, head_dim: int) -> list[tuple[int, int]]:
    """Fast weights of one head, layer by layer."""
    K, h = head_dim, config.expansion * head_dim
    return [(K, h), (h, K)] if config.kind == "mlp" else [(K, K)]


def _memory(
    config: ModelConfig, position: int, num_tokens: int, written: Sequence[int] | None
) -> tuple[int, int]:
    """Multiply-adds and cubes of solves of one lane, for a memory that is read as it is written."""
    c, C, K = config, config.chunk, config.head_dim
    delta, levels = c.memory.kind == "delta", c.memory.levels
    shapes = _shapes(c.memory, K)
    weights = sum(i * o for i, o in shapes)
    reads = _reads(position, num_tokens, C, 0)
    adds = solve = 0
    for read, n in zip(reads, written or [read.shown for read in reads], strict=True):
        closes = (read.number + 1) * C <= position + num_tokens
        add, cube = _write(c, read.shown, n, closes)
        if n:
            # the base and what was there at the start
            add += (levels + (not delta)) * read.queries * weights
            add += 2 * read.queries * n * sum(i for i, _ in shapes)  # this chunk's own steps
        else:
            add += read.queries * weights
        adds, solve = adds + add, solve + cube
    project = num_tokens * c.dim * c.num_heads * (4 * K + 2 + levels)
    return project + c.num_heads * adds, c.num_heads * solve


def _fast(config: ModelConfig, position: int, num_tokens: int, rows: int) -> tuple[int, int]:
    """Multiply-adds and cubes of solves of one lane's fast weights.

    An MLP is asked once in a call for all of its keys, which are then read like those of the store.
    Written awake, they cost what a memory by the delta rule costs, three gates included, but for
    the queries, keys and values, which are the window's.
    """
    c, H, K = config, config.num_heads, config.head_dim
    if c.fast.kind == "mlp":
        queries = sum(read.queries for read in _reads(position, num_tokens, c.chunk, 0))
        read = queries * (2 * K + K // 4 // 2 * 2 + (c.store.score == "mass"))
        return rows * H * (read + K * K + 2 * K * hidden_width(c.fast, K)), 0
    if c.fast.write == "asleep":
        return num_tokens * H * (2 * K * K + c.dim), 0  # queries are mapped first
    like = replace(c, combine="mag", memory=MemoryConfig(kind="delta"))
    adds, solve = _memory(like, position, num_tokens, None)
    return adds - num_tokens * c.dim * H * 4 * K, solve


def _pages(
    config: ModelConfig, position: int, num_tokens: int, written: Sequence[int] | None
) -> tuple[int, int]:
    """The same with pages: two reads and an append of every token, and writes at a page's end.

    The keys and values that attention makes of the first read are counted here.
    """
    c, C, K, P = config, config.chunk, config.head_dim, config.memory.page
    weights = sum(i * o for i, o in _shapes(c.memory, K))
    gates = 2 + c.memory.levels
    read = c.dim * (2 * K + gates) + weights  # per head
    append = c.dim * (2 * K + gates)
    context = c.dim * 2 * K
    adds = num_tokens * (2 * read + append + context)
    adds += len(_chunks(position, num_tokens, P)) * P * weights  # errors, for the surprise
    closing = range(position // P * P // C, (position + num_tokens) // P * P // C)
    solve = 0
    for n in written or [C] * len(closing):
        add, cube = _write(c, C, n, closes=True)
        adds, solve = adds + add, solve + cube
    return c.num_heads * adds, c.num_heads * solve


def _write(config: ModelConfig, shown: int, n: int, closes: bool) -> tuple[int, int]:
    """Multiply-adds and cubes of solves of one head and chunk: errors, plan, steps, write.

    n: tokens that are written, of those `shown` whose errors are taken.
    """
    K, levels = config.head_dim, config.memory.levels
    shapes = _shapes(config.memory, K)
    weights = sum(i * o for i, o in shapes)
    adds = shown * weights
    if n == 0:
        return adds, 0
    adds += n * n * K + (levels - 1) * n * n * (n + 1)
    match config.memory.kind:
        case "mlp":
            h = shapes[0][1]
            adds += n * K * h + n * n * h + K * K * h
        case "delta":
            adds += n * n * K
    if closes:
        adds += levels * n * weights + 4 * (levels - 1) * weights
    return adds, n**3 if config.memory.kind == "delta" else 0


def _memory_bytes(config: ModelConfig, size: int) -> int:
    """Bytes of one lane's memory whose numbers take `size` bytes."""
    m, H, K = config.memory, config.num_heads, config.head_dim
    slots = m.page or config.chunk
    weights = m.levels * sum(i * o for i, o in _shapes(m, K))
    tail = (m.taps - 1) * (3 if m.page is None else 2) * K
    numbers = H * (weights + slots * (2 * K + 1 + m.levels) + tail) + 2
    return numbers * size + slots
