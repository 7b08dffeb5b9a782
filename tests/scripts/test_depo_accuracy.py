"""What is counted as right is what a model says, by the hops that were asked for."""

import sys

import pytest
import torch

from wakesleep.streams.depo import Depo, DepoConfig
from wakesleep.ttl.fast import FastConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.model_io import save_model

DEPO = DepoConfig(nodes=6, hops=4, queries=3, context=12, names=10)


class Oracle:
    """Follows the edges that it has read, as many hops as it has made passes over all windows."""

    config = ModelConfig(vocab_size=16, window=6, chunk=6)

    def init_state(self, lanes):
        return torch.empty(lanes, 0, dtype=torch.int64), 1

    def __call__(self, tokens, state, head=True):
        read, passes = state
        if not head:
            return None, (torch.cat([read, tokens], 1), passes), None
        logits = torch.zeros(*tokens.shape, 16)
        for lane, (edges, row) in enumerate(zip(read.tolist(), tokens.tolist(), strict=True)):
            after = dict(zip(edges[0::2], edges[1::2], strict=True))
            for column in range(0, len(row), 4):
                hops, node = row[column : column + 2]
                for _ in range(min(hops, passes)):
                    node = after[node]
                logits[lane, column + 2, node] = 1.0
        return logits, state, None


@pytest.mark.parametrize("passes, right", [(1, {1}), (2, {1, 2}), (4, {1, 2, 4})])
def test_right_answers_are_counted_by_hops_and_passes(script, monkeypatch, passes, right):
    module = script("depo_accuracy")
    monkeypatch.setattr(module, "LANES", 10)
    slept = []

    def sleep_through(model, state, num_passes, evict):
        slept.append((num_passes, evict))
        return state[0], num_passes

    monkeypatch.setattr(module, "sleep_through", sleep_through)
    found = module.ask(Oracle(), Depo(DEPO, 24, 0, longest=True), 40, passes, "hard", "refreshed")
    assert sum(asked for _, asked in found.values()) == 120 and set(found) == {1, 2, 4}
    assert {hop for hop, (told, asked) in found.items() if told == asked} == right
    assert slept == [(passes, "hard")] * 8  # two windows of four batches


CONFIG = ModelConfig(
    vocab_size=72,
    dim=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    window=6,
    chunk=6,
    memory_layers=(),
    store_layers=(),
    fast_layers=(0, 1),
    fast=FastConfig(write="always", passes=2),
    recent=6,
)


def fast_weights(state):
    return torch.stack([block.fast.s for block in state.blocks])


@torch.inference_mode()
def test_controls_are_what_they_say(script):
    """Tokens of one window, float64, gates that keep everything."""
    module = script("depo_accuracy")
    torch.manual_seed(0)
    model, tokens = TTLModel(CONFIG).double().eval(), torch.randint(72, (3, 6))
    for block in model.blocks:
        block.attention.fast.gates.bias[2:4] = 40.0
    once = module._context(model, tokens, 1, "keep", "refreshed")
    for sleep in module.SLEEPS:
        assert torch.equal(
            fast_weights(module._context(model, tokens, 1, "keep", sleep)), fast_weights(once)
        )
    found = {name: module._context(model, tokens, 2, "keep", name) for name in module.SLEEPS}
    all_of_them = [fast_weights(found[name]) for name in module.SLEEPS]
    assert len({round(float(s.norm()), 9) for s in all_of_them}) == len(module.SLEEPS)
    _, frozen, reset, cross = all_of_them
    assert not frozen.allclose(fast_weights(once))
    with module._arguments(model, wanted=True) as seen:
        _, read, _ = model(tokens, model.init_state(3), head=False)
    assert not any(b.attention.fast._forward_pre_hooks for b in model.blocks)
    empty = module._with_fast(read, model.init_state(3))
    again = module._written_again(model, empty, seen)
    torch.testing.assert_close(fast_weights(again), fast_weights(once))
    twice = module._written_again(model, read, seen)
    torch.testing.assert_close(fast_weights(twice), frozen)
    assert torch.equal(found["frozen"].recent.hidden, once.recent.hidden)
    other = model.sleep_pass(module._with_fast(read, model.init_state(3)))
    torch.testing.assert_close(fast_weights(other), reset)
    other = model.sleep_pass(once, over=module._from_the_start(model, read))
    torch.testing.assert_close(fast_weights(other), cross)


def test_a_row_for_every_number_of_passes_is_printed(script, monkeypatch, tmp_path, capsys):
    module = script("depo_accuracy")
    save_model(tmp_path / "m", TTLModel(CONFIG), b"{}", "# no text")
    words = ["depo_accuracy.py", str(tmp_path / "m"), "--passes", "1,2", "--sequences", "100"]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    first, head, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "12 nodes, 4 windows of 6, evict=hard"
    assert head == "| sleep | passes | hops 1 | hops 2 | hops 4 |"
    assert [row[:17] for row in rows] == ["| refreshed | 1 |", "| refreshed | 2 |"]
    monkeypatch.setattr(sys, "argv", [*words, "--sleep", "frozen,thawed"])
    with pytest.raises(SystemExit):
        module.main()
    assert (
        "--sleep thawed: what there is: refreshed, frozen, reset, cross" in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", [*words, "--context", "25"])
    with pytest.raises(SystemExit):
        module.main()
    assert "multiple of the window 6" in capsys.readouterr().err
