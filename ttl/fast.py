"""Fast weights: a memory per head that shares queries, keys and values with the window.

A pair of the store is a pair of the fast weights: sleep writes it once more, here, and its place in
the store is free. Keys and queries know no position and are of length 1, without what all of them
share (`key_space.py`).

    kind="matrix"   a linear memory: written in closed form, holds about K pairs (safe). Its answer
                    to a query is added to what the window says; a gate per head and token says
                    how much of it is read: where nothing is asked, it can be shut.
    kind="mlp"      two layers: written by gradient steps, holds several times as many (capacity).
                    Keys stay outside, values go in. Once the store has let go of a pair, the
                    softmax over window and store sees its key in another group, with the value
                    that the MLP gives for it. An answer to a query alone could not tell that
                    another pair is meant.

    write="asleep"   sleep alone writes; awake, all tokens read the same fast weights
    write="always"   every token writes by the gated delta rule, too, and reads behind its write:
                     the setting of arXiv 2605.26099, and what sleep by recurrence needs

Shapes: B lanes, T tokens, H heads, K head width, S store places, C chunk, N chunks, G = N * C, M
hidden width of an MLP; Y = K for a matrix, 2 M for an MLP.
Source of the delta rule: Gated DeltaNet, arXiv 2412.06464; see `kernels/delta_rule.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wakesleep.kernels.delta_rule import DeltaMemory
from wakesleep.kernels.memory_chunk import Chunks
from wakesleep.kernels.rehearsed_write import first_weights, mlp_answer
from wakesleep.ttl.grid import Grid, carry, from_chunks, gather, scatter, to_chunks
from wakesleep.ttl.key_space import KeySpace, unit_key
from wakesleep.ttl.memory_scan import scan
from wakesleep.ttl.state import FastState, KeyState, ProbeState

PROBES = 256  # per head: half of them for the gate, half for an audit that it never sees
OLD_KEYS = 16  # whose values an MLP can hold, in widths of a head
GATE_INIT = 1.0  # of a matrix's reads at the start: a written value comes back as it was
KEEP_INIT, STEP_INIT = 0.995, 0.5  # of writes awake
GATE_STD = 0.02  # of the weights of all gates


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    kind: Literal["matrix", "mlp"] = "matrix"
    expansion: int = 4  # hidden width of an mlp per head width
    write: Literal["asleep", "always"] = "asleep"
    lam: float = 0.05  # ridge of the protected write; one key of length 1 has weight 1
    passes: int = 1  # most passes over what was read last that training has made; 1 = none in sleep

    def __post_init__(self) -> None:
        if self.write not in ("asleep", "always"):
            raise ValueError(f"fast.write must be asleep or always, got {self.write!r}")
        if self.kind not in ("matrix", "mlp"):
            raise ValueError(f"fast.kind must be matrix or mlp, got {self.kind!r}")
        if self.kind == "mlp" and self.write == "always":
            raise ValueError("fast.kind=mlp is written asleep only, got fast.write=always")
        if not 1 <= self.expansion <= 64:
            raise ValueError(f"fast.expansion must be from 1 to 64, got {self.expansion}")
        if not 1e-6 <= self.lam < math.inf:
            raise ValueError(f"fast.lam must be from 1e-6 to inf, got {self.lam}")
        if not 1 <= self.passes <= 64:
            raise ValueError(f"fast.passes must be from 1 to 64, got {self.passes}")


class Told(NamedTuple):
    """Pairs of an MLP, for the softmax."""

    k: Tensor  # [B, H, N, K] keys, as those of stored pairs
    v: Tensor  # [B, H, N, K] what is given for them, float32 at least; zeros in other rows
    open: Tensor  # [B, H, N] bool: rows that the softmax sees


class FastWeights(nn.Module):
    """The read of fast weights, and their write awake; they themselves are in the state."""

    def __init__(
        self, config: FastConfig, dim: int, num_heads: int, head_dim: int, chunk: int
    ) -> None:
        super().__init__()
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        awake = config.write == "always"
        self.chunk = chunk if awake else 0
        starts = torch.tensor([GATE_INIT]).expm1().log()
        if awake:
            starts = torch.cat([starts, torch.tensor([KEEP_INIT, STEP_INIT]).logit()])
        self.space = None if awake else KeySpace(num_heads, head_dim)
        self.gates = None
        if config.kind == "mlp":  # the softmax is its gate
            return
        self.gates = nn.Linear(dim, len(starts) * num_heads)  # read, then keep and step
        nn.init.normal_(self.gates.weight, std=GATE_STD)
        with torch.no_grad():
            self.gates.bias.copy_(starts.repeat_interleave(num_heads))

    def init_state(self, batch: int, capacity: int, like: Tensor) -> FastState:
        """Fast weights of lanes that have read nothing, with a store of `capacity` (0 = none)."""
        hidden = hidden_width(self.config, self.head_dim)
        sizes = (batch, self.num_heads, self.head_dim, capacity, self.chunk, hidden)
        return no_fast_weights(like, *sizes)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        live: Tensor,
        state: FastState,
        grid: Grid,
        keep_power: float = 1.0,
        recompute: bool = False,
    ) -> tuple[Tensor | None, FastState]:
        """What the call's tokens read of a matrix, [B, T, H, K], and the next state.

        Of an MLP nothing: the softmax sees its pairs, see `told`.

        Args:
            x: [B, T, D] the block's input; q: [B, T, H, K] its queries.
            k, v: [B, G, H, K] of the open chunk and the call; live: [B, G] bool.
            keep_power: exponent of what a token keeps: 0 = nothing decays.
            recompute: do the work of each chunk again in the backward pass.
        """
        if self.gates is None:
            return None, state
        gates = self.gates(x).to(state.gates.dtype)
        opened = F.softplus(gates[..., : self.num_heads])[..., None]  # [B, T, H, 1]
        if self.space is not None:
            return (read(self.space(q), state) * opened).to(q.dtype), state
        gates = gates[..., self.num_heads :].sigmoid()
        gates = gates.unflatten(-1, (2, self.num_heads)).transpose(-1, -2)
        gates = scatter(grid, gates, state.gates)  # [B, G, H, 2]
        opened_gates, queries, asking, size = carry(grid, gates), q, q.shape[1], grid.shown
        if grid.alone:
            k, v, live, gates = (t[:, :size] for t in (k, v, live, gates))
        else:
            asking = self.chunk
            queries = scatter(grid, q, q.new_zeros(q.shape[0], self.chunk, *q.shape[2:]))
        with torch.autocast(x.device.type, enabled=False):
            k = unit_key(k)
            dtype, B = k.dtype, live.shape[0]
            keep, step = to_chunks(gates, size).to(dtype).unbind(-1)
            chunks = Chunks(
                to_chunks(unit_key(queries), asking),
                to_chunks(k, size),
                to_chunks(v.to(dtype), size),
                keep=keep if keep_power == 1 else keep**keep_power,
                eta=None,
                step=step,
                live=live.reshape(B, -1, size).transpose(0, 1),
                closed=torch.arange(grid.num_chunks, device=x.device)[:, None] < grid.closed,
            )
            stacks, unused = (state.s.to(dtype).flatten(0, 1),), k.new_zeros(B, 2)
            run = scan(DeltaMemory(), stacks, chunks, unused, recompute=recompute)
            y = from_chunks(run.y, self.num_heads)
            y = y if grid.alone else gather(grid, y, x.shape[1])
            y = (y * opened).to(q.dtype)
            s = run.stacks[0].unflatten(0, (B, -1)).to(state.s.dtype)
        return y, state._replace(s=s, gates=opened_gates)

    def told(self, state: FastState) -> Told | None:
        """What an MLP gives for the keys that the softmax sees; None if there are none."""
        rows = open_keys(state)
        if not rows:
            return None
        k, shown = state.old.k[:, :, :rows], state.old.open[:, :, :rows]
        with torch.autocast(k.device.type, enabled=False):
            keys = self.space.keys(torch.where(shown[..., None], k, 0.0))
            return Told(k, answer(state.s.to(keys.dtype), keys), shown)


def held_keys(state: FastState) -> int:
    """Rows in front of an MLP's keys that hold one in any head; 0 of a matrix."""
    return _rows(state.old.position >= 0) if state.old else 0


def open_keys(state: FastState) -> int:
    """The same of those that the softmax sees."""
    return _rows(state.old.open) if state.old else 0


def _rows(held: Tensor) -> int:
    rows = held.flatten(0, -2).any(0).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def read(q: Tensor, state: FastState) -> Tensor:
    """What fast weights give back for queries q [B, T, H, K], at the values' length, in float32.

    The less a query resembles what was written, the fainter the answer: it is not normalised.
    """
    with torch.autocast(q.device.type, enabled=False):
        unit = unit_key(q).transpose(1, 2)
        return answer(state.s.to(unit.dtype), unit).transpose(1, 2)


def answer(s: Tensor, k: Tensor) -> Tensor:
    """What fast weights s [B, H, K, Y] give back for keys or queries k [B, H, n, K] of length 1."""
    return k @ s if is_linear(s) else mlp_answer(s, k)


def is_linear(s: Tensor) -> bool:
    """Whether fast weights s [.., K, Y] are a matrix, not an MLP: then Y is K."""
    return s.shape[-1] == s.shape[-2]


def hidden_width(config: FastConfig, head_dim: int) -> int:
    """M of an MLP, 0 of a matrix."""
    return config.expansion * head_dim if config.kind == "mlp" else 0


def no_fast_weights(
    like: Tensor,
    batch: int,
    num_heads: int,
    head_dim: int,
    capacity: int = 0,
    chunk: int = 0,
    hidden: int = 0,
) -> FastState:
    """Nothing written, no probes, on the device of `like` and with probes of its dtype.

    Args:
        chunk: tokens of the open chunk whose gates are kept; 0 where nothing is written awake.
        hidden: M of an MLP; 0 for a matrix.
    """
    heads = (batch, num_heads)
    wide = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    s = torch.zeros(*heads, head_dim, head_dim, **wide)
    places = torch.full((*heads, capacity), -1, device=like.device)
    covariance, old = s.clone(), None
    if hidden:
        covariance = covariance[:, :, :0].clone()
        keys = like.new_zeros(*heads, OLD_KEYS * head_dim, head_dim)
        empty = torch.full(keys.shape[:-1], -1, device=like.device)
        score = torch.full_like(empty, -math.inf, dtype=torch.float32)
        old = KeyState(keys, score, empty, empty >= 0)
        s = first_weights(num_heads, head_dim, hidden).to(**wide).expand(batch, -1, -1, -1).clone()
    k = like.new_zeros(*heads, PROBES, head_dim)
    probes = ProbeState(k, k.clone(), places.new_full((*heads, PROBES), -1))
    gates = torch.zeros(batch, chunk, num_heads, 2, **wide)
    return FastState(s, covariance, gates, places, probes, old)


def follow(asleep: Tensor, position: Tensor) -> Tensor:
    """What `asleep` [B, H, S] says of the places of another store with pairs at position [B, H, N].

    A pair is known by its position: of pairs that are in neither, or in both, -1 or it.
    """
    known = asleep.sort(-1).values
    if not known.shape[-1]:
        return torch.full_like(position, -1)
    found = torch.searchsorted(known, position).clamp(max=known.shape[-1] - 1)
    return torch.where(known.gather(-1, found) == position, position, -1)
