"""The promises about the shipped model: what is old, what came later, what was never said."""

import random

import pytest
import torch

from wakesleep.streams.ask import ask
from wakesleep.streams.documents import open_document
from wakesleep.streams.facts import make_facts, make_unplanted
from wakesleep.streams.families import TRAINED_KINDS
from wakesleep.streams.language_model import DEFAULT, load_language_model
from wakesleep.streams.planting import BUNDLED
from wakesleep.streams.prompts import encode_answer, encode_question, statement_ids
from wakesleep.streams.token_reader import open_tokens
from wakesleep.ttl import attention as attention_module

MEGABYTE = 1 << 20
RANKS = 4096  # over which ranks were spread in training


@pytest.fixture(scope="module")
def shipped():
    return load_language_model(device="cpu")


@pytest.fixture(scope="module")
def text(shipped):
    """Ids of the bundled document's first pages."""
    return open_tokens(open_document(str(BUNDLED)), shipped.tokenizer).read(30_000).tolist()


def read(shipped, text, statements, gap=300, **sizes):
    """The state after statements with `gap` tokens of other text behind each of them."""
    ids = []
    for n, statement in enumerate(statements):
        ids += [
            *statement_ids(shipped.tokenizer, statement),
            *text[n * gap : (n + 1) * gap],
        ]
    ids += text[-500:]  # so that no statement is in the window any more
    with torch.inference_mode():
        state = shipped.model.init_state(1, **sizes)
        return shipped.model(torch.tensor([ids]), state, head=False)[1]


def answers(shipped, state, facts):
    with torch.inference_mode():
        return [ask(shipped, state, fact.question) for fact in facts]


def right(found, facts):
    return sum(given.answer == fact.answer for given, fact in zip(found, facts, strict=True))


def test_it_is_small_and_has_what_the_code_builds(shipped):
    files = list(DEFAULT.iterdir())
    assert sum(path.stat().st_size for path in files) < 12 * MEGABYTE
    assert {path.name for path in files} == {
        "README.md",
        "config.json",
        "known.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert shipped.model.config.store.capacity <= RANKS
    assert 0 < shipped.known_threshold < 1


def test_no_logit_falls_by_a_nat_when_a_pair_grows_old(shipped, text, monkeypatch):
    """From the newest 64 ranks to the oldest of 4,096."""
    facts = make_facts(30, 1, TRAINED_KINDS)
    state = read(shipped, text, [said for fact in facts for said in fact.statements], capacity=64)
    original, seen = attention_module.softmax_read, []
    config = shipped.model.config
    nearest = 1 + config.window + config.chunk  # all that layers without a store see

    def spy(logits, *rest):
        if logits.shape[-1] > nearest:
            seen.append(logits[..., -64:].clone())
        return original(logits, *rest)

    monkeypatch.setattr(attention_module, "softmax_read", spy)
    changes = []
    for fact in facts:
        ids = encode_question(shipped.tokenizer, fact.question)
        ids = torch.tensor([ids + encode_answer(shipped.tokenizer, fact.answer)])
        for first in (0, RANKS - 64):
            table = torch.arange(first, first + 64)[None]
            with torch.inference_mode():
                shipped.model(ids, state, rank_table=table, head=False)
        half = len(seen) // 2
        for near, far in zip(seen[:half], seen[half:], strict=True):
            changes.append(float((near - far).abs().max()))
        seen.clear()
    assert len(changes) >= 30 and 0.2 < max(changes) < 1


def test_the_later_of_two_equal_statements_counts(shipped, text):
    """The same sentence with another city, between those of 39 others: the last one is told."""
    facts = make_facts(40, 2, ("residence",))
    earlier = [
        fact.statements[0].replace(fact.values[0], other.values[0])
        for fact, other in zip(facts, facts[1:] + facts[:1], strict=True)
    ]
    order = random.Random(0)
    order.shuffle(earlier)
    later = order.sample([fact.statements[0] for fact in facts], len(facts))
    state = read(shipped, text, [*earlier, *later])
    assert right(answers(shipped, state, facts), facts) >= 34


def test_what_was_said_is_known_and_what_was_not_is_not(shipped, text):
    facts = make_facts(40, 3, TRAINED_KINDS)
    state = read(shipped, text, [said for fact in facts for said in fact.statements])
    said = answers(shipped, state, facts)
    assert right(said, facts) >= 36 and sum(given.known for given in said) >= 36
    nothing = answers(shipped, state, make_unplanted(facts, 3, TRAINED_KINDS))
    assert sum(given.known for given in nothing) <= 4
