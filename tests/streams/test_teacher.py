"""The admission head and the layers below it learn which tokens the answers read."""

import torch
import torch.nn.functional as F
from torch import nn

from wakesleep.streams.teacher import admission_loss, fact_ranking, marked
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import SPAN, StoreState

RULES = {"threshold": 0.1, "positive_weight": 5.0}


def everything(position):
    return position >= 0


def nothing(position):
    return position < -1


def planted(seed, width=8, places=64, needed=4, empty=6):
    """Hidden states [1, H, S, D] and a store, without scores, whose needed pairs carry a mark."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(places).where(torch.arange(places) < places - empty, -1)
    position = torch.stack([position, position.flip(0)])  # each head has an order of its own
    x = torch.randn(1, 2, places, width, generator=generator)
    mass = torch.rand(1, 2, places, generator=generator) * 0.05
    marked = torch.randperm(places - empty, generator=generator)[:needed]
    for head in range(2):  # half of them are read by each
        x[0, head, torch.isin(position[head], marked), head] += 4.0
        mass[0, head, torch.isin(position[head], marked[head::2])] = 0.5
    position = position[None]
    return x, StoreState(
        k=x,
        v=x,
        score=torch.zeros(1, 2, places),
        mass=mass,
        position=position,
        span=torch.full((1, 2, places, SPAN), -1, dtype=torch.int32),
        moments=torch.zeros(1, 2, 3),
    )


def state_with(store):
    """A stream state of two layers, the second of which has `store`."""
    config = ModelConfig(
        vocab_size=16,
        dim=8,
        num_layers=2,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        memory_layers=(),
        store_layers=(1,),
    )
    state = TTLModel(config).init_state(1)
    blocks = [b._replace(memory=None) for b in state.blocks]
    return state._replace(blocks=(blocks[0], blocks[1]._replace(store=store)))


def scored(head, seed):
    """A planted store with the scores of `head`, -inf where it is empty."""
    x, store = planted(seed)
    score = torch.stack([head(x[:, h])[..., h] for h in range(2)], 1)
    return state_with(store._replace(score=score.masked_fill(store.position < 0, -torch.inf)))


def test_the_head_learns_to_tell_planted_tokens_from_noise():
    head = nn.Linear(8, 2)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for seed in range(150):
        loss, _ = admission_loss(scored(head, seed), everything, nothing, **RULES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, found = admission_loss(scored(head, 1000), everything, nothing, **RULES)
    assert found["noise_above"] < 0.02 and found["recall"] == 1.0 and found["precision"] > 0.5
    assert found["needed"] == 4 / 58


def test_pairs_that_cannot_be_judged_teach_nothing():
    _, store = planted(0)
    score = torch.randn(store.score.shape).masked_fill(store.position < 0, -torch.inf)
    score.requires_grad_()
    state = state_with(store._replace(score=score))
    loss, found = admission_loss(state, lambda p: p >= 30, nothing, **RULES)
    loss.backward()
    seen = store.position >= 30
    assert (score.grad[~seen] == 0).all() and (score.grad[seen] != 0).all()
    read = store.position[store.mass > 0.1]  # by either head
    needed = torch.isin(store.position, read)[seen].float()
    assert needed.sum() == 2 * (read >= 30).sum() > 0
    losses = F.binary_cross_entropy_with_logits(score.detach()[seen], needed, reduction="none")
    torch.testing.assert_close(loss.detach(), (losses * (1 + 4 * needed)).mean())
    none, found = admission_loss(state, nothing, nothing, **RULES)
    assert float(none) == 0 and found == {} and not none.requires_grad


def test_a_fact_that_nobody_read_is_no_example_of_noise():
    _, store = planted(0)
    score = torch.zeros_like(store.mass).masked_fill(store.position < 0, -torch.inf)
    score.requires_grad_()
    state = state_with(store._replace(score=score))
    read = torch.isin(store.position, store.position[store.mass > 0.1])
    facts = torch.zeros(1, 64, dtype=torch.bool)
    facts[0, store.position[read][0]] = True  # one that was read
    unread = store.position[~read & (store.position >= 0)][:5]
    facts[0, unread] = True

    def spared(stored):
        return marked(stored, torch.arange(64)[None], facts)

    loss, found = admission_loss(state, everything, spared, **RULES)
    loss.backward()
    left_out = torch.isin(store.position, unread)
    assert left_out.sum() == 10 and (score.grad[left_out] == 0).all()
    assert (score.grad[read] < 0).all()
    assert (score.grad[~read & ~left_out & (store.position >= 0)] > 0).all()
    assert found["needed"] == 8 / (2 * 58 - 10)


def test_the_gradient_reaches_the_head_and_what_it_sees_but_no_read():
    config = ModelConfig(
        vocab_size=16,
        dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=16,
        window=8,
        chunk=4,
        memory_layers=(),
        store_layers=(1,),
    )
    model = TTLModel(config).train()
    tokens = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(2, 32)
    weight[:, 20:] = 1.0
    _, state, _ = model(tokens, model.init_state(2, capacity=32), read_weight=weight)
    loss, found = admission_loss(state, everything, nothing, threshold=0.02, positive_weight=5.0)
    loss.backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(n.startswith("blocks.1.attention.store.head") for n in reached)
    assert "embedding.weight" in reached and "blocks.0.attention.qkv.weight" in reached
    above = {n for n in reached if n.startswith("blocks.1")} - {"blocks.1.norm.weight"}
    assert all(n.startswith("blocks.1.attention.store.head") for n in above)
    assert 0 < found["needed"] < 1


def test_facts_are_counted_in_every_head():
    _, store = planted(0, places=8, empty=2)
    position = torch.tensor([[0, 1, 2, 3, 100, 101, 102, 103, 104, 105]])  # 4..99: distractors
    stored = torch.tensor([[[0, 2, 50, 60, 101, 104, -1, -1], [1, 2, 3, 70, 102, 103, -1, -1]]])
    fact = torch.zeros(1, 10, dtype=torch.bool)
    fact[0, [1, 2, 6, 8]] = True  # at 1, 2, 102 and 104, which is still in the window
    score = torch.tensor(
        [
            [[9.0, 5, 99, 99, 1, -99, -99, -99], [3.0, 4, 2, 99, 9, 3.5, -99, -99]],
        ]
    )
    state = state_with(store._replace(position=stored, score=score))
    last = torch.tensor([103])
    assert fact_ranking(state, position, fact, last, keep_all=False) == {"facts_kept": 2 / 3}
    # medians: -99 of (5, -99) in head 0, below both others; 4 of (3, 4, 9) in head 1, above both
    assert fact_ranking(state, position, fact, last, keep_all=True) == {"noise_above_facts": 1.0}
    lost = stored.clone()
    lost[0, 1, 0] = -1
    state = state_with(store._replace(position=lost, score=score))
    assert fact_ranking(state, position, fact, last, keep_all=False) == {"facts_kept": 1 / 2}
    assert fact_ranking(state, position, fact, torch.tensor([0]), keep_all=False) == {}
