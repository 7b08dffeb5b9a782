"""What a training step hands to the teacher: positions, read mass, and what may be judged by it."""

import dataclasses

import pytest
import torch

from wakesleep.streams import training
from wakesleep.streams.mqar import MQARConfig
from wakesleep.streams.teacher import marked
from wakesleep.streams.training import StreamModule
from wakesleep.streams.training_config import AdmissionConfig, DataConfig, StepConfig, TrainConfig
from wakesleep.streams.training_data import open_source
from wakesleep.streams.unroll import unroll
from wakesleep.ttl import attention as attention_module
from wakesleep.ttl.model import ModelConfig
from wakesleep.ttl.state import SPAN, SPAN_AFTER
from wakesleep.ttl.store import StoreConfig

B, T, W, C = 2, 64, 16, 8
FRONT = 1  # the sink
FLOOR = 0.02  # below what an untrained model's reads give
ADMISSION = AdmissionConfig(
    keep_all_share=1.0, distractor_share=1.0, distractor_pool=32, threshold=FLOOR
)
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=64,
        dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        window=W,
        chunk=C,
        memory_layers=(0,),
        store_layers=(1,),
        store=StoreConfig(capacity=16, hidden=8),
    ),
    data=DataConfig(kind="mqar", mqar=MQARConfig(pairs=6, queries=6, vocab_size=64)),
    train=StepConfig(lanes=B, sequence_len=T, segments_per_step=2),
    admission=ADMISSION,
)


@pytest.fixture(params=[True, False], ids=["keeps all", "selects"])
def step(request, monkeypatch):
    """A step with distractors between its segments, and everything that was handed on in it."""
    share = float(request.param)
    config = dataclasses.replace(
        CONFIG, admission=dataclasses.replace(ADMISSION, keep_all_share=share)
    )
    torch.manual_seed(1)
    module, source, seen = StreamModule(config), open_source(config), {}
    reads, original_read = [], attention_module.softmax_read
    originals = {name: getattr(training, name) for name in ("unroll", "admission_loss")}

    def watched(*args):
        reads.clear()
        seen["args"], seen["read"] = args, originals["unroll"](*args)
        seen["shares"] = list(reads)
        return seen["read"]

    def admission_loss(state, judged, spared, **rules):
        seen["judged"], seen["spared"] = judged, spared
        return originals["admission_loss"](state, judged, spared, **rules)

    def softmax_read(*args):
        out, p = original_read(*args)
        reads.append(p.detach())
        return out, p

    monkeypatch.setattr(training, "unroll", watched)
    monkeypatch.setattr(training, "admission_loss", admission_loss)
    monkeypatch.setattr(attention_module, "softmax_read", softmax_read)
    for number in range(8):
        batch = source.batch(number)
        draws = torch.rand(2, B, T, generator=torch.Generator().manual_seed(number))
        recalled = batch.recalled * (draws[1] < 0.7)  # others are about nothing
        batch = batch._replace(value=draws[0] < 0.4, recalled=recalled)
        module.training_step(batch, number)
        draw = seen["args"][3]
        if draw.jumps[1] and draw.orders[1].shape[1] >= 4:
            seen["batch"] = seen["args"][1]
            return seen
    raise AssertionError("no step had distractors between its segments")


def own_columns(seen):
    """[B, H, S] the column of every stored pair that is the lane's own, -1 for all others."""
    read = seen["read"]
    store = read.state.blocks[1].store
    column = torch.full_like(store.position, -1)
    for t in range(T):
        only = torch.zeros(B, T, dtype=torch.bool)
        only[:, t] = True
        column[marked(store.position, read.stored, only)] = t
    return store, column


def test_positions_are_those_of_the_tokens_even_behind_a_jump(step):
    store, column = own_columns(step)
    tokens = step["batch"].tokens[:, None].expand(-1, 2, -1)
    there = column >= 0
    own_ids = tokens.gather(2, column.clamp(min=0))
    assert torch.equal(store.span[..., SPAN - 1 - SPAN_AFTER][there].long(), own_ids[there])
    foreign, draw = torch.zeros_like(there), step["args"][3]
    for start, stop in step["read"].foreign:
        foreign |= (store.position >= start) & (store.position < stop)
    assert not (foreign & there).any()
    assert torch.equal(there | foreign, store.position >= 0)
    if draw.keep_all:
        assert there.sum(2).eq(T - W).all()  # also what was in the window when others came
        given = sum((order >= 0).sum(1) for order in draw.orders if order is not None)
        assert torch.equal(foreign.sum(2)[:, 0], given)


def test_other_text_leaves_another_memory_before_each_segment(step):
    """Before segment 0 that of the lane before, before segment 1 that of the lane two before."""
    model, batch, state, draw, pool, floor, *_ = step["args"]
    before, half = step["read"].hidden, T // 2
    for lane in range(B):
        learned = tuple(w.clone() for w in pool.pasts[0].weights)
        for weights in learned:
            weights[lane] += 1.0
        pasts = (pool.pasts[0]._replace(weights=learned), *pool.pasts[1:])
        after = unroll(model, batch, state, draw, pool._replace(pasts=pasts), floor).hidden
        assert torch.equal(after[lane, :half], before[lane, :half])
        assert not torch.equal(after[lane, half:], before[lane, half:])
        assert not torch.equal(after[1 - lane, :half], before[1 - lane, :half])


def test_mass_is_what_recalled_answers_read_of_the_store(step):
    store, _ = own_columns(step)
    keep_all, batch = step["args"][3].keep_all, step["batch"]
    half = T // C // 2  # chunks of a segment, which one layer reads after the other
    assert len(step["shares"]) == 4 * half and batch.recalled.sum() > 0
    shares = [*step["shares"][half : 2 * half], *step["shares"][3 * half :]]
    total = torch.zeros(B, 2)
    for n, p in enumerate(shares):
        far = p[..., FRONT + W + C :]
        weight = batch.recalled[:, None, n * C : (n + 1) * C, None]
        total += (torch.where(far > FLOOR, far, 0.0) * weight).sum((2, 3))
    if keep_all:
        torch.testing.assert_close(store.mass.sum(2), total)
        assert total.min() > 0
    else:
        assert store.mass.sum() == 0


def test_only_what_the_last_answer_could_read_is_judged_and_no_value_is_noise(step):
    if not step["args"][3].keep_all:
        assert "judged" not in step
        return
    store, column = own_columns(step)
    last = torch.where(step["batch"].recalled > 0, torch.arange(T), -1).amax(1)
    gone = last // C * C - W  # columns before this one had left the window
    expected = (column >= 0) & (column < gone[:, None, None])
    assert torch.equal(step["judged"](store.position) & (store.position >= 0), expected)
    assert 0 < expected.sum() < (column >= 0).sum()
    value = step["batch"].value[:, None].expand(-1, 2, -1).gather(2, column.clamp(min=0))
    assert torch.equal(step["spared"](store.position), value & (column >= 0))
