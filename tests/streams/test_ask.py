"""Answers come from a copy of the state, with how sure they are and where they were read."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from wakesleep.streams.ask import MAX_ANSWER, ask, reply_to
from wakesleep.streams.errors import Refused
from wakesleep.streams.prompts import STOP, UNKNOWN, encode_answer
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.segments import Segment
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.state import flatten
from wakesleep.ttl.store import StoreConfig


@pytest.fixture
def read(language_model):
    """A state that has read 400 tokens, and these."""
    draw = random.Random(3)
    words = [f"{draw.choice('abcdefgh')}{draw.randint(0, 999)}" for _ in range(200)]
    ids = np.array(language_model.tokenizer.encode(" ".join(words))[:400])
    runner = StreamRunner(language_model)
    runner.read(Segment(ids, np.ones(400, bool)))
    return runner.state, ids.tolist()


class Scripted(torch.nn.Module):
    """Says given tokens with given probabilities after a question, whatever was read."""

    def __init__(self, model, script):
        super().__init__()
        self.model, self.script = model, list(script)

    def window_of(self, state):
        return self.model.window_of(state)

    def forward(self, tokens, state, *, head=True, **options):
        logits, state, stats = self.model(tokens, state, head=head, **options)
        if head:
            token, p, others = self.script.pop(0)
            rest = (1 - p - sum(others.values())) / (logits.shape[-1] - 1 - len(others))
            logits = torch.full_like(logits, rest)
            for index, value in {token: p, **others}.items():
                logits[0, -1, index] = value
            logits = logits.log()
        return logits, state, stats


def say(language_model, answer, p=0.9, unknown=0.01):
    ids = encode_answer(language_model.tokenizer, answer)
    script = [(ids[0], p, {UNKNOWN: unknown})]
    script += [(token, p, {}) for token in ids[1:]]
    return language_model._replace(model=Scripted(language_model.model, script))


def test_asking_leaves_the_state_as_it_was(language_model, read):
    state, _ = read
    before = {name: tensor.clone() for name, tensor in flatten(state).items()}
    first = ask(language_model, state, "Where does Ann Reed live?")
    assert ask(language_model, state, "Where does Ann Reed live?") == first
    for name, tensor in flatten(state).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert first.tokens == 400
    json.dumps(first._asdict(), allow_nan=False)


def test_the_answer_is_read_up_to_its_stop(language_model, read):
    answer = ask(say(language_model, "4821"), read[0], "What is the pass code?")
    assert answer.answer == "4821" and answer.known
    n = len(encode_answer(language_model.tokenizer, "4821"))
    assert answer.confidence == pytest.approx(0.99 * (0.9 / 0.99 * 0.9 ** (n - 1)) ** (1 / n))


def test_confidence_falls_with_the_share_of_unknown(language_model, read):
    sure = ask(say(language_model, "4821", 0.6, 0.05), read[0], "What?")
    unsure = ask(say(language_model, "4821", 0.6, 0.35), read[0], "What?")
    assert sure.known and not unsure.known and unsure.answer == "4821"
    threshold = say(language_model, "4821", 0.6, 0.35)._replace(known_threshold=0.3)
    assert ask(threshold, read[0], "What?").known


def test_an_answer_is_a_guess_where_the_model_says_that_there_is_none(language_model, read):
    """Not the likeliest token decides, unless it is all but certain that nothing was said."""
    tokens = encode_answer(language_model.tokenizer, "4821")
    for unknown, said in ((0.94, "4821"), (0.96, "")):
        unsure = ask(say(language_model, "4821", 0.03, unknown), read[0], "What?")
        assert unsure.answer == said and not unsure.known and unsure.confidence < 0.06
    likely = 0.4 * (0.3 / 0.4 * 0.3 ** (len(tokens) - 1)) ** (1 / len(tokens))
    for threshold, known in ((1.01 * likely, False), (0.99 * likely, True)):
        model = say(language_model, "4821", 0.3, 0.6)._replace(known_threshold=threshold)
        answer = ask(model, read[0], "What?")
        assert answer.answer == "4821" and answer.known == known


def test_an_answer_holds_something(language_model, read):
    script = [(STOP, 0.9, {500: 0.05}), (STOP, 0.9, {})]
    silent = language_model._replace(model=Scripted(language_model.model, script))
    assert ask(silent, read[0], "What?").answer == language_model.tokenizer.decode([500]).strip()


def test_an_answer_without_end_is_cut(language_model, read):
    script = [(900 + i, 0.9, {}) for i in range(100)]
    endless = language_model._replace(model=Scripted(language_model.model, script))
    ask(endless, read[0], "What?")
    assert len(endless.model.script) == 100 - MAX_ANSWER


@pytest.mark.parametrize("special", [0, 1, 2, 5])
def test_no_other_special_token_is_said(language_model, read, special):
    script = [(special, 0.9, {500: 0.05}), (STOP, 0.9, {})]
    odd = language_model._replace(model=Scripted(language_model.model, script))
    assert ask(odd, read[0], "What?").answer == language_model.tokenizer.decode([500]).strip()


def test_a_question_longer_than_the_window_is_refused(language_model, read):
    with pytest.raises(Refused, match="window holds 64"):
        ask(language_model, read[0], "who " * 70)
    with pytest.raises(Refused, match="empty"):
        ask(language_model, read[0], "  ")


def test_passages_are_what_stands_at_their_position(language_model, read):
    state, ids = read
    answer = ask(language_model, state, "Where does Ann Reed live?")
    assert 1 <= len(answer.passages) <= 5
    whole = language_model.tokenizer.decode(ids)
    for passage in answer.passages:
        place = passage["position"]
        assert passage["text"] in whole
        assert language_model.tokenizer.decode(ids[place - 3 : place + 4]) in passage["text"]
    masses = [passage["mass"] for passage in answer.passages]
    assert masses == sorted(masses, reverse=True) and 0 < sum(masses) <= 1


def test_what_was_read_before_the_question_is_no_reason_for_the_answer(language_model, read):
    state, _ = read
    blocks = [
        block._replace(store=block.store and block.store._replace(mass=torch.rand(1, 2, 32)))
        for block in state.blocks
    ]
    again = ask(language_model, state._replace(blocks=tuple(blocks)), "Where?")
    assert again.passages == ask(language_model, state, "Where?").passages


def test_what_the_question_reads_is_no_reason_for_the_answer(language_model, read):
    config = replace(language_model.model.config, store=StoreConfig(capacity=32, score="mass"))
    by_mass = language_model._replace(model=TTLModel(config))
    runner = StreamRunner(by_mass)
    runner.read(Segment(np.array(read[1]), np.ones(400, bool)))
    reply = reply_to(by_mass, runner.state, "Where does the owner of the amber gate live?" * 4)
    mass = reply.state.blocks[1].store.mass.sum(-1)  # [1, H], at most 1 for each query
    assert 0 < mass.max() <= reply.queries
