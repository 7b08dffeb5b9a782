"""How far passes of sleep can follow pointers: a model with weights set by hand, and its oracle.

    python scripts/pointer_doubling.py
    python scripts/pointer_doubling.py --nodes 40 --windows 8 --draws 3

The edges of one cycle are read in random order, one token each. Layer h writes into its fast
weights where 2^h edges lead from a node, as far as layer h - 1 knows, so that each pass over all
edges doubles how far is known. What a model says runs through the code that streams run: reading,
then sleep of N - 1 passes (`sleep.rule=recurrent` behind every window of edges, `cross` over the
store at the end). The oracle does the same with dictionaries. No weight is trained.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from wakesleep.consolidation.budget import Ledger
from wakesleep.consolidation.sleep import sleep
from wakesleep.consolidation.sleep_config import SleepConfig
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import StreamState
from wakesleep.ttl.store import StoreConfig

HOPS = (1, 2, 4, 8, 16)
OPEN, SHUT = 30.0, 100.0  # logit of a gate that is open, and of a sink that takes all attention
PLENTY = Ledger(granted=10**18)


@torch.no_grad()
def build(after: np.ndarray, window: int) -> TTLModel:
    """A model that reads edges `node -> after[node]`; token n is the edge from node n.

    Its width holds a node six times: where the edge begins, and where 1, 2, 4, 8, 16 edges lead.
    """
    nodes, levels = len(after), len(HOPS)
    config = ModelConfig(
        vocab_size=max(nodes + 1, 16),
        dim=(1 + levels) * nodes,
        num_layers=levels,
        num_heads=1,
        head_dim=nodes,
        mlp_dim=8,
        window=window,
        chunk=window,
        memory_layers=(),
        store_layers=(0,),
        fast_layers=tuple(range(levels)),
        recent=window,
        store=StoreConfig(score="recency", capacity=2 * nodes),
        fast=FastConfig(write="always", passes=64),
    )
    model = TTLModel(config).double()
    for parameter in model.parameters():
        parameter.zero_()
    node = torch.eye(nodes, dtype=torch.float64)
    model.embedding.weight[:nodes, :nodes] = node
    model.embedding.weight[:nodes, nodes : 2 * nodes] = node[torch.from_numpy(after)]
    model.norm.weight.fill_(1.0)
    for level, block in enumerate(model.blocks):
        attention, here = block.attention, (1 + level) * nodes
        block.norm.weight.fill_(1.0)
        attention.taps[:, -1] = 1.0
        attention.q_gain.fill_(1.0)
        attention.k_gain.fill_(1.0)
        attention.sink.fill_(SHUT)
        q, k, v = attention.qkv.weight.split(nodes)
        q[:, here : here + nodes] = node
        k[:, :nodes] = node
        v[:, here : here + nodes] = node
        if level + 1 < levels:
            attention.out.weight[here + nodes : here + 2 * nodes] = node
        attention.fast.gates.bias.fill_(OPEN)
    return model


def read_and_sleep(model: TTLModel, order: np.ndarray, rule: str, passes: int) -> StreamState:
    """The state after reading the edges in this order, with N = passes; N = 1 is reading alone.

    `recurrent` sleeps behind every window, `cross` once, when all edges are in the store.
    """
    window, nodes = model.config.window, model.config.head_dim
    config = SleepConfig(
        rule=rule, passes=passes, tail_loss=100.0, tolerance=0.01, span_tokens=4 * nodes
    )
    state, generator = model.init_state(1), torch.Generator().manual_seed(0)
    windows = -(-len(order) // window)
    idle = (windows + 3) * window - len(order)  # empty tokens push the last edges into the store
    tokens = torch.from_numpy(np.concatenate([order, np.full(idle, nodes)]))[None]
    with torch.inference_mode():
        for index, part in enumerate(tokens.split(window, 1)):
            _, state, _ = model(part, state, head=False)
            if rule == "recurrent" and index < windows:
                state, _, _ = sleep(model, state, config, PLENTY, generator)
        if rule == "cross":
            state, _, _ = sleep(model, state, config, PLENTY, generator)
    return state


def recall(state: StreamState, after: np.ndarray) -> list[float]:
    """Share of the nodes from which the fast weights know where 1, 2, 4, 8, 16 edges lead."""
    found, target = [], np.arange(len(after))
    for level, hops in enumerate(HOPS):
        told = state.blocks[level].fast.s[0, 0]
        known = told.norm(dim=-1) > 1e-3
        for _ in range(hops if level == 0 else hops // 2):
            target = after[target]
        right = known & (told.argmax(-1) == torch.from_numpy(target))
        found.append(float(right.double().mean()))
    return found


def oracle(after: np.ndarray, order: np.ndarray, size: int, passes: int) -> list[float]:
    """The same with dictionaries; `size` edges are passed over before the next ones come."""
    maps: list[dict[int, int]] = [{} for _ in HOPS]
    for first in range(0, len(order), size):
        for _ in range(passes):
            for node in order[first : first + size].tolist():
                value = int(after[node])
                for level, known in enumerate(maps):
                    if level:
                        value = maps[level - 1].get(value)
                    if value is None:
                        break
                    known[node] = value
    return [len(known) / len(after) for known in maps]


def draw(nodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One cycle through all nodes, `after[node]`, and a random order of its edges."""
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(nodes)
    after = np.empty(nodes, np.int64)
    after[cycle] = np.roll(cycle, -1)
    return after, rng.permutation(nodes)


def main() -> None:
    """Print the table of recall by hops and passes, model and oracle."""
    parser = argparse.ArgumentParser(description="how far passes of sleep follow pointers")
    parser.add_argument("--nodes", type=int, default=75)
    parser.add_argument("--windows", type=int, default=4, help="parts that the edges are read in")
    parser.add_argument("--passes", default="1,2,3,4", help="N, the first pass is reading")
    parser.add_argument("--draws", type=int, default=5, help="cycles to take the mean of")
    given = parser.parse_args()
    window = -(-given.nodes // given.windows)
    head = " | ".join(f"{hops} hop{'s' if hops > 1 else ''}" for hops in HOPS)
    print(f"| over | N | {head} | oracle |\n|---|--:|{'--:|' * len(HOPS)}---|")
    for rule, words in (("recurrent", f"{given.windows} windows"), ("cross", "the store")):
        size = window if rule == "recurrent" else given.nodes
        for passes in map(int, given.passes.split(",")):
            rows, same = [], []
            for seed in range(given.draws):
                after, order = draw(given.nodes, seed)
                model = build(after, window)
                rows.append(recall(read_and_sleep(model, order, rule, passes), after))
                same.append(np.allclose(rows[-1], oracle(after, order, size, passes)))
            means = " | ".join(f"{x:.2f}" for x in np.mean(rows, 0))
            print(f"| {words} | {passes} | {means} | {'equal' if all(same) else 'DIFFERENT'} |")


if __name__ == "__main__":
    main()
