"""Memory layers, ours and titans-pytorch's, as `wakesleep bench` times them.

Both read segments [1, T, D] with carried state in float32: an MLP of two layers with a residual and
a LayerNorm per head, hidden width twice that of the head, with momentum. Both have projections to
queries, keys and values, keys and queries normalised per head, gates, and an output that is
normalised and gated per head and projected. Ours has its gates per token and bounds its step;
theirs has one momentum and decay per chunk. What only one of them has is left out: ours the short
convolution (`taps=1`), theirs the norm of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wakesleep.kernels.memory_reference import Rule, Tokens, memory_loop
from wakesleep.streams.bench_config import BenchConfig, heads_of, width_of
from wakesleep.streams.bench_measure import Contender, Unequal
from wakesleep.streams.bench_titans import EXPANSION, TitansLayer, check_online
from wakesleep.ttl.grid import make_grid
from wakesleep.ttl.memory import NORM_EPS, MemoryConfig, NeuralMemory

OURS = "ours"
PER_CHUNK, SHORT_CALLS, PER_TOKEN = (
    "titans-pytorch, per chunk",
    "titans-pytorch, per chunk, short calls",
    "titans-pytorch, per token",
)
SHORT_CALL = 256  # tokens; titans-pytorch keeps the weights of all chunks of a call
TOLERANCE = 1e-9  # of float64 numbers about 1
CHECK_CHUNK = 16  # tokens; the reference compares each with all of its chunk

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # segment [1, T, D], carried -> output, carried


def streaming_layer(config: BenchConfig, shape: str, name: str) -> Contender:
    """A layer that reads a stream of noise, a call per turn."""
    if name == OURS:
        memory = our_memory(shape, config.chunk)
        num_weights = sum(w.numel() for w in memory.init_state(1).weights)
        step, length = our_step(memory), config.tokens

        def check() -> str:
            deviation = check_outputs(memory, config.seed)
            return f"outputs as token by token in float64, within {deviation:.0e}"
    else:
        per_token = name == PER_TOKEN
        theirs = TitansLayer(*heads_of(shape), 1 if per_token else config.chunk, config.chunk)
        step, num_weights = theirs, theirs.num_weights
        length = {PER_TOKEN: config.chunk, SHORT_CALLS: min(SHORT_CALL, config.tokens)}.get(name)
        length = length or config.tokens

        def check() -> str:
            return check_online(theirs, config.chunk, config.seed)

    draw = torch.Generator().manual_seed(config.seed)
    carried = None

    @torch.inference_mode()
    def turn() -> Tensor:
        nonlocal carried
        x = torch.randn(1, length, width_of(shape), generator=draw)
        y, carried = step(x, carried)
        return y

    return Contender(length, turn, check, {"fast_weights": num_weights})


def training_layer(config: BenchConfig, shape: str, name: str) -> Contender:
    """Forward and backward pass of a layer over a sequence of noise."""
    if name == OURS:
        layer = our_memory(shape, config.chunk)
        forward: Step = our_step(layer)

        def check() -> str:
            deviation = check_gradients(layer, config.seed)
            return f"gradients as token by token in float64, within {deviation:.0e}"
    else:
        layer = forward = TitansLayer(*heads_of(shape), config.chunk, config.chunk)

        def check() -> str:
            return check_online(layer, config.chunk, config.seed)

    draw = torch.Generator().manual_seed(config.seed)
    x = torch.randn(1, config.tokens, width_of(shape), generator=draw)

    def turn() -> Tensor:
        layer.zero_grad(set_to_none=True)
        y, _ = forward(x, None)
        loss = y.square().mean()
        loss.backward()
        return loss.detach()

    return Contender(config.tokens, turn, check)


def our_memory(shape: str, chunk: int) -> NeuralMemory:
    """Our memory with the parts that both have."""
    heads, width = heads_of(shape)
    config = MemoryConfig(kind="mlp", expansion=EXPANSION, momentum=True, taps=1)
    return NeuralMemory(config, heads * width, heads, width, chunk)


def our_step(memory: NeuralMemory) -> Step:
    """Read a segment [1, T, D]; carried are the state and the position."""

    def step(x: Tensor, carried: Any) -> tuple[Tensor, Any]:
        state, position = carried or (memory.init_state(1), torch.zeros(1, dtype=torch.int64))
        lengths = torch.tensor([x.shape[1]])
        grid = make_grid(position, lengths, memory.chunk, x.shape[1])
        live = torch.ones(x.shape[:2], dtype=torch.bool)
        y, state, _ = memory(x, state, grid, live)
        return y, (state, position + lengths)

    return step


def reference_output(memory: NeuralMemory, x: Tensor) -> Tensor:
    """Output for x [T, D] with weights of its own for every token and gradients by autograd."""
    config, H, K = memory.config, memory.num_heads, memory.head_dim
    q, k, v = (memory.qkv(x) * memory.taps[:, 0]).view(-1, 3, H, K).unbind(1)
    q, k = (F.rms_norm(t, (K,), eps=NORM_EPS) / math.sqrt(K) for t in (q, k))
    gate, keep, step, eta = memory.gates(x).sigmoid().view(-1, 4, H).unbind(1)
    heads = []
    for h in range(H):
        rule = Rule(
            memory.chunk,
            config.max_step,
            config.huber * math.sqrt(K),
            tuple(w[h] for w in memory.initial),
            memory.gamma[h],
            memory.bias[h],
        )
        gates = keep[:, h], config.max_momentum * eta[:, h], step[:, h]
        written = torch.ones(len(x), dtype=torch.bool)
        tokens = Tokens(q[:, h], k[:, h], F.silu(v[:, h]), *gates, written)
        fresh = tuple(torch.zeros_like(w) for w in rule.base)
        y, _, _ = memory_loop(rule, fresh, fresh, tokens)
        heads.append(F.rms_norm(y, (K,), eps=NORM_EPS) * memory.gain[h] * gate[:, h, None])
    return memory.out(torch.cat(heads, 1))


def check_outputs(memory: NeuralMemory, seed: int) -> float:
    """Largest deviation from the reference in float64, over a chunk boundary and a cut.

    Raises:
        Unequal: it is above `TOLERANCE`.
    """
    exact, x = _exact(memory, seed)
    step, carried, pieces = our_step(exact), None, []
    with torch.no_grad():
        for piece in x[None].split(max(1, exact.chunk * 2 // 3), 1):
            y, carried = step(piece, carried)
            pieces.append(y[0])
    reference = reference_output(exact, x).detach()
    return _within(float((torch.cat(pieces) - reference).abs().max()), "outputs are")


def check_gradients(memory: NeuralMemory, seed: int) -> float:
    """Largest deviation of a gradient from the reference's in float64, as a share of its largest.

    Raises:
        Unequal: it is above `TOLERANCE`.
    """
    exact, x = _exact(memory, seed)
    found = _gradients(exact, our_step(exact)(x[None], None)[0])
    expected = _gradients(exact, reference_output(exact, x))
    shares = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for a, b in zip(found, expected, strict=True)
    ]
    return _within(max(shares), "gradients are")


def _exact(memory: NeuralMemory, seed: int) -> tuple[NeuralMemory, Tensor]:
    """The same memory in float64, and noise [T, D] of a chunk and a half.

    Chunks are short, and gates differ from token to token.
    """
    width, chunk = memory.qkv.in_features, min(CHECK_CHUNK, memory.chunk)
    exact = NeuralMemory(memory.config, width, memory.num_heads, memory.head_dim, chunk).double()
    exact.load_state_dict(memory.state_dict())
    draw = torch.Generator().manual_seed(seed)
    nn.init.normal_(exact.gates.weight, std=0.1, generator=draw)
    length = chunk * 3 // 2 + 1
    return exact, torch.randn(length, width, generator=draw, dtype=torch.float64)


def _gradients(module: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(module.parameters())))


def _within(deviation: float, what: str) -> float:
    if not deviation <= TOLERANCE:
        raise Unequal(f"{what} {deviation:.1e} from the reference")
    return deviation
