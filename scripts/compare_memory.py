"""Time our neural memory against titans-pytorch's in its online mode, side by side in one process.

    pip install titans-pytorch==0.5.5    # no dependency: into an environment for this alone
    python scripts/compare_memory.py

Both read a stream, segment by segment with carried state, on the CPU, in float32, without
gradients: an MLP of two layers with a residual and a LayerNorm per head, hidden width twice that of
the head, with momentum. Sizes are 1 head of 256 and 4 of 64.

titans-pytorch learns online only if `batch_size` is set: without it every gradient is taken at the
initial weights for ever. It is timed in two such settings:

    every CHUNK tokens   chunk_size = batch_size = CHUNK: the weights that are read change per chunk
    every token          chunk_size = 1, batch_size = CHUNK: a token reads weights of its own that
                         have learned it, gradients are taken at those of the chunk's start. This
                         is the recurrence that ours computes, always

Two ratios come out, each of the worse size: to the first setting, which computes less, in calls of
its own best length, and to the second. Its largest step is 0.01: with the default, 1, it ends in
NaN within 2,048 tokens of noise.

Nothing is timed before our output equals the token-by-token reference in float64, and before it is
seen that the weights which titans-pytorch takes its gradients at do move. The exit code is 1 if
either fails or an output is not finite.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wakesleep.kernels.memory_reference import Rule, Tokens, memory_loop
from wakesleep.streams.allocator import allocator, restart_with_tuned_malloc
from wakesleep.ttl.grid import make_grid
from wakesleep.ttl.memory import NORM_EPS, MemoryConfig, NeuralMemory

SHAPES = ((1, 256), (4, 64))  # heads, head width
EXPANSION = 2
LARGEST_STEP = 0.01  # of titans-pytorch
EVERY_TOKEN = "every token"
SHORT_CALL = 256  # tokens; titans-pytorch keeps the weights of all chunks of a call
TOLERANCE = 1e-9  # of float64 outputs about 1
PARTS = """
| part | ours | titans-pytorch |
|---|---|---|
| projections to queries, keys, values | yes | yes |
| keys and queries normalised per head | yes | yes (`qk_rmsnorm`) |
| gates | per token: step, momentum, keep | per token: step; per chunk: momentum, keep |
| output normalised per head, gated per head, projected | yes | yes (`post_rmsnorm`; gate and \
projection are the library's own with 4 heads, added here with 1) |
| short convolution | left out (`taps=1`) | has none |
| norm of the input | not part of it | left out (`pre_rmsnorm=False`) |
| bound on the step, errors clipped, surprise per token returned | yes | no |
"""

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # segment [1, T, D], carried -> output, carried


class Reader(NamedTuple):
    """A memory as it is timed."""

    name: str
    changes: str  # how often the weights that are read change
    num_weights: int  # fast weights, all heads
    segment_len: int
    step: Step


class Timing(NamedTuple):
    reader: Reader
    rates: list[float]  # tokens per second of each call
    finite: bool

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


class Theirs(nn.Module):
    """titans-pytorch's memory; with one head, plus the gate and projection that it has with more.

    Raises:
        ImportError: titans-pytorch is not installed.
    """

    def __init__(self, num_heads: int, head_dim: int, chunk: int, batch: int) -> None:
        from titans_pytorch import NeuralMemory as TitansMemory

        super().__init__()
        dim = num_heads * head_dim
        self.memory = TitansMemory(
            dim=dim,
            heads=num_heads,
            dim_head=head_dim,
            chunk_size=chunk,
            batch_size=batch,
            momentum=True,
            pre_rmsnorm=False,
            post_rmsnorm=True,
            qk_rmsnorm=True,
            default_step_transform_max_lr=LARGEST_STEP,
            default_model_kwargs={"depth": 2, "expansion_factor": float(EXPANSION)},
        )
        self.gate = nn.Linear(dim, 1) if num_heads == 1 else None
        self.out = nn.Linear(dim, dim, bias=False) if num_heads == 1 else None

    @property
    def num_weights(self) -> int:
        return sum(p.numel() for p in self.memory.memory_model_parameters)

    def forward(self, x: Tensor, carried: Any) -> tuple[Tensor, Any]:
        y, carried = self.memory(x, state=carried)
        if self.out is not None:
            y = self.out(y * self.gate(x).sigmoid())
        return y, carried


def our_memory(num_heads: int, head_dim: int, chunk: int) -> NeuralMemory:
    """Our memory with the parts that both have."""
    config = MemoryConfig(kind="mlp", expansion=EXPANSION, momentum=True, taps=1)
    return NeuralMemory(config, num_heads * head_dim, num_heads, head_dim, chunk)


def our_step(memory: NeuralMemory, recompute: bool = False) -> Step:
    """Read a segment [1, T, D]; carried are the state and the position.

    Args:
        recompute: do the work of each chunk again in a backward pass instead of keeping it.
    """

    def step(x: Tensor, carried: Any) -> tuple[Tensor, Any]:
        state, position = carried or (memory.init_state(1), torch.zeros(1, dtype=torch.int64))
        lengths = torch.tensor([x.shape[1]])
        grid = make_grid(position, lengths, memory.chunk, x.shape[1])
        live = torch.ones(x.shape[:2], dtype=torch.bool)
        y, state, _ = memory(x, state, grid, live, recompute)
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


def check_ours(memory: NeuralMemory, seed: int) -> float:
    """Largest deviation from the reference in float64, over a chunk boundary and a cut.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    exact = copy.deepcopy(memory).double()
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(memory.chunk + 8, memory.qkv.in_features, generator=draw, dtype=torch.float64)
    step, carried, pieces = our_step(exact), None, []
    with torch.no_grad():
        for piece in x[None].split(memory.chunk * 2 // 3, 1):
            y, carried = step(piece, carried)
            pieces.append(y[0])
    deviation = float((torch.cat(pieces) - reference_output(exact, x).detach()).abs().max())
    if not deviation <= TOLERANCE:
        raise ValueError(f"our output is {deviation:.1e} from the reference: nothing is timed")
    return deviation


@torch.inference_mode()
def check_online(theirs: Theirs, x: Tensor, chunk: int) -> None:
    """See that x [1, T, D] moves the weights of gradients, and a chunk the outputs of the next.

    Raises:
        ValueError: gradients are still taken at the initial weights, or nothing is learned.
    """
    y, state = theirs(x, None)
    fresh = theirs.memory.memory_model_parameters
    if all(torch.equal(now[0], p[0]) for now, p in zip(state.weights.values(), fresh, strict=True)):
        raise ValueError("titans-pytorch takes its gradients at the initial weights: not online")
    other = x.clone()
    other[:, :chunk] = torch.randn_like(x[:, :chunk])
    changed, _ = theirs(other, None)
    if torch.equal(changed[:, chunk], y[:, chunk]):
        raise ValueError("what titans-pytorch reads in a chunk does not reach the next one")


def readers(num_heads: int, head_dim: int, chunk: int, segment_len: int) -> Iterator[Reader]:
    """What is timed for one shape; all is checked before."""
    dim = num_heads * head_dim
    ours = our_memory(num_heads, head_dim, chunk)
    deviation = check_ours(ours, seed=1)
    print(f"{num_heads} x {head_dim}: ours is {deviation:.0e} from the reference", file=sys.stderr)
    state = ours.init_state(1)
    num_weights = sum(w.numel() for w in state.weights)
    yield Reader("ours", EVERY_TOKEN, num_weights, segment_len, our_step(ours))
    per_chunk = Theirs(num_heads, head_dim, chunk, chunk)
    per_token = Theirs(num_heads, head_dim, 1, chunk)
    settings = [
        (per_chunk, f"every {chunk} tokens", segment_len),
        (per_chunk, f"every {chunk} tokens", SHORT_CALL),
        (per_token, EVERY_TOKEN, chunk),
    ]
    for theirs, changes, length in settings:
        check_online(theirs, torch.randn(1, 4 * chunk, dim), chunk)
        yield Reader("titans-pytorch", changes, theirs.num_weights, length, theirs)


@torch.inference_mode()
def measure(contenders: list[Reader], dim: int, warmup: int, repeats: int) -> list[Timing]:
    """Let everyone read a segment in turn, `repeats` times after `warmup` rounds."""
    carried: list[Any] = [None] * len(contenders)
    rates: list[list[float]] = [[] for _ in contenders]
    finite = [True] * len(contenders)
    for turn in range(warmup + repeats):
        for index, reader in enumerate(contenders):
            x = torch.randn(1, reader.segment_len, dim)
            start = time.perf_counter()
            y, carried[index] = reader.step(x, carried[index])
            seconds = time.perf_counter() - start
            finite[index] &= bool(y.isfinite().all())
            if turn >= warmup:
                rates[index].append(reader.segment_len / seconds)
    return [Timing(*row) for row in zip(contenders, rates, finite, strict=True)]


def ratio(timings: list[Timing], *, per_token: bool) -> float:
    """Our speed over the best of titans-pytorch with weights per token, or per chunk."""
    ours, *theirs = timings
    same = [t.rate for t in theirs if (t.reader.changes == EVERY_TOKEN) == per_token]
    return ours.rate / max(same)


def rows(shape: tuple[int, int], timings: list[Timing]) -> Iterator[str]:
    """Markdown rows of one shape."""
    for reader, rates, finite in timings:
        rate = statistics.median(rates)
        relative = "" if reader.name == "ours" else f"{timings[0].rate / rate:.2f}"
        cells = [
            f"{shape[0]} x {shape[1]}",
            reader.name,
            reader.changes,
            f"{reader.num_weights:,}",
            f"{reader.segment_len:,}",
            f"{rate:,.0f}" if finite else "not finite",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
            relative,
        ]
        yield f"| {' | '.join(cells)} |"


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    """Read the command line, check, time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segment", type=int, default=2048, help="tokens per call")
    parser.add_argument("--chunk", type=int, default=64, help="tokens between two gradient points")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = {}
    try:
        version = importlib.metadata.version("titans-pytorch")
        for shape in SHAPES:
            contenders = list(readers(*shape, args.chunk, args.segment))
            results[shape] = measure(contenders, math.prod(shape), args.warmup, args.repeats)
    except ImportError as error:
        print(f"{error}. Install it: pip install titans-pytorch==0.5.5")
        return 1
    except ValueError as error:
        print(error)
        return 1
    print(f"{cpu_name()}, threads: {args.threads}, {allocator(os.environ)}")
    print(f"torch {torch.__version__}, titans-pytorch {version}, float32, batch 1")
    print(f"chunk {args.chunk}, median of {args.repeats} calls in turn\n")
    print(
        "| heads | memory | weights change | fast weights | call | tokens/s | spread | ours / it |"
    )
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for shape, timings in results.items():
        print("\n".join(rows(shape, timings)))
    print(PARTS)
    per_chunk, per_token = (
        min(ratio(timings, per_token=kind) for timings in results.values())
        for kind in (False, True)
    )
    print(f"Ours at its worse size: {per_chunk:.2f}x the speed of weights that change per chunk,")
    print(f"{per_token:.1f}x that of weights that change per token, as ours do.")
    return 0 if all(t.finite for timings in results.values() for t in timings) else 1


if __name__ == "__main__":
    restart_with_tuned_malloc()
    sys.exit(main())
