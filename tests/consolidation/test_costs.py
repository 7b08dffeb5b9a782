"""The cost of every step of sleep against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wakesleep.consolidation.costs import (
    Sizes,
    audit_cost,
    choose_cost,
    gate_cost,
    keys_cost,
    mark_cost,
    release_cost,
    write_cost,
)
from wakesleep.consolidation.gate import NOISE_CUES, audit, judge, known_after, without_superseded
from wakesleep.consolidation.replay import Standard, change, choose, mark, release, seen_by
from wakesleep.ttl.fast import no_fast_weights
from wakesleep.ttl.key_space import KeySpace, unit_key
from wakesleep.ttl.state import SPAN, StoreState

B, H = 2, 3


def count(call, *inputs):
    with FlopCounterMode(display=False) as counter:
        result = call(*inputs)
    return counter.get_total_flops(), result


STANDARD = Standard(0.9, torch.full((), 0.3))


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize(("places", "head_dim", "num_pairs"), [(20, 8, 4), (5, 12, 8), (33, 5, 1)])
def test_formulas_equal_what_torch_counts(places, head_dim, num_pairs, hidden):
    sizes = Sizes(B * H, places, head_dim, 4, hidden)
    pair = torch.randn(2, B, H, places, head_dim)
    number = torch.randn(B, H, places)
    span = torch.zeros(B, H, places, SPAN, dtype=torch.int32)
    store = StoreState(*pair, number, number, number.argsort(-1), span, number[..., :3])
    fast = no_fast_weights(pair, B, H, head_dim, places, hidden=hidden)
    if hidden:
        sizes = sizes._replace(held=3)
        fast.old.k[:, :, :3] = unit_key(torch.randn(B, H, 3, head_dim))
        fast.old.position[:, :, :3] = 1
    linalg = 0 if hidden else B * H * (-(-(head_dim**3) // 3) + 2 * head_dim**3)

    flops, (seen, fast) = count(seen_by, KeySpace(H, head_dim), store, fast)
    assert flops == keys_cost(sizes).flops and torch.equal(seen.k, unit_key(store.k))
    flops, pairs = count(choose, store, fast, num_pairs, -1e9)
    assert flops == choose_cost(sizes, num_pairs).flops
    flops, full = count(change, fast, pairs, 0.05, 7)
    assert flops + linalg == write_cost(sizes, num_pairs, 7).flops
    cues = unit_key(torch.randn(NOISE_CUES, head_dim))
    flops = count(without_superseded, fast, pairs)[0]
    flops += count(judge, fast, full, pairs, cues, STANDARD)[0]
    flops += count(known_after, full, pairs, STANDARD)[0]
    assert flops == gate_cost(sizes, num_pairs).flops
    assert count(audit, fast, STANDARD)[0] == audit_cost(sizes).flops
    flops, full = count(mark, store, full, pairs, STANDARD)
    assert flops == mark_cost(sizes).flops
    most = int((full.asleep >= 0).sum(-1).max())
    assert most > 0
    flops, _ = count(release, store, full, STANDARD, torch.Generator().manual_seed(0))
    assert flops == release_cost(sizes, most).flops
    for cost in (choose_cost(sizes, num_pairs), release_cost(sizes, most), mark_cost(sizes)):
        assert cost.nbytes >= pair.numel() * 4 and cost.seconds == 0.0
