"""A part that is off is as good as missing, and nothing of the session changes by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from wakesleep.streams.language_model import LanguageModel, load_language_model
from wakesleep.streams.runner import StreamRunner
from wakesleep.streams.segments import Segment
from wakesleep.streams.session import Session
from wakesleep.streams.tokenizer import END, NUM_SPECIAL
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.state import flatten

QUESTIONS = ["What is the pass code of the amber gate?", "Where does Ann Reed live?"]
TOLERANCE = 1e-5  # float32


@pytest.fixture
def session(session_folder):
    return Session.load(session_folder)


@pytest.fixture
def conditions(script):
    return script("recall_conditions")


@torch.inference_mode()
def logits_after(model, state):
    """Predictions over more tokens than a chunk has, so that a boundary is passed."""
    tokens = torch.arange(100, 140)[None]
    return model(tokens, state)[0]


def same(one, other):
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("condition", "memory_layers", "store_layers"),
    [("store off", (0,), ()), ("memory off", (), (1,)), ("both off", (), ())],
)
def test_a_part_that_is_off_predicts_like_a_model_that_lacks_it(
    conditions, session, make_model, condition, memory_layers, store_layers
):
    given = next(conditions.given_for(condition, session, QUESTIONS))
    twin = load_language_model(make_model(memory_layers, store_layers)).model
    twin.load_state_dict(session.language_model.model.state_dict(), strict=False)
    blocks = [
        block._replace(
            memory=block.memory if index in memory_layers else None,
            store=block.store if index in store_layers else None,
        )
        for index, block in enumerate(session.runner.state.blocks)
    ]
    state = session.runner.state._replace(blocks=tuple(blocks))
    off = logits_after(given.language_model.model, given.state)
    torch.testing.assert_close(off, logits_after(twin, state), rtol=0, atol=TOLERANCE)
    on = logits_after(session.language_model.model, session.runner.state)
    assert (on - off).abs().max() > 100 * TOLERANCE


def test_a_memory_of_pages_that_is_off_shows_no_keys(conditions):
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    config = ModelConfig(
        **sizes,
        window=32,
        chunk=16,
        combine="mac",
        memory_layers=(0,),
        store_layers=(),
        memory=MemoryConfig(page=32),
    )
    model = TTLModel(config)
    twin = TTLModel(replace(config, memory_layers=()))
    twin.load_state_dict(model.state_dict(), strict=False)
    with torch.inference_mode():
        state = model(torch.arange(200, 250)[None], model.init_state(1))[1]
    (block,) = state.blocks
    lacking = state._replace(blocks=(block._replace(memory=None, page=None),))
    given = conditions.switched_off(LanguageModel(model, None, "0"), state, memory=True)
    off, on = (logits_after(m, state) for m in (given.language_model.model, model))
    torch.testing.assert_close(off, logits_after(twin, lacking), rtol=0, atol=TOLERANCE)
    assert (on - off).abs().max() > 100 * TOLERANCE


def test_switching_off_leaves_model_and_state_of_the_session_alone(conditions, session):
    weights = {k: t.clone() for k, t in session.language_model.model.state_dict().items()}
    state = session.runner.state
    before = {name: tensor.clone() for name, tensor in flatten(state).items()}
    conditions.switched_off(session.language_model, state, store=True, memory=True)
    after = session.language_model.model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in flatten(state).items())


def test_reset_is_a_state_that_has_read_nothing(conditions, session):
    given = next(conditions.given_for("reset", session, QUESTIONS))
    assert not same(given.state, session.runner.state)
    assert same(given.state, session.language_model.model.init_state(1))


def test_bm25_reads_the_passages_it_found_the_best_one_last(conditions, session, script):
    facts = session.manifest.facts[:2]
    all_given = list(conditions.given_for("bm25", session, [fact.question for fact in facts]))
    archive = np.fromfile(session.folder / "ids.bin", "<u2")
    for fact, given in zip(facts, all_given, strict=True):
        assert given.starts[0] <= fact.positions[-1] < given.starts[0] + 128
        assert len(given.starts) == 4
        read = []
        for start in reversed(given.starts):
            read += [*archive[start : start + 128].tolist(), END]
        ids = np.array(read[:-1])
        runner = StreamRunner(session.language_model)
        runner.read(Segment(ids, ids >= NUM_SPECIAL))
        assert same(given.state, runner.state)


def test_a_session_is_asked_only_in_conditions_that_it_has(conditions, make_model, text, tmp_path):
    whole = ["as read", "store off", "memory off", "both off", "reset", "bm25"]
    expected = {
        ((0,), (1,), True): whole,
        ((0,), (1,), False): whole[:-1],
        ((), (1,), True): ["as read", "store off", "reset", "bm25"],
        ((), (), True): ["as read", "reset", "bm25"],
    }
    for number, ((memory, store, keep_ids), names) in enumerate(expected.items()):
        options = {"keep_ids": keep_ids, "limit_tokens": 100, "threads": 1}
        folder = tmp_path / str(number)
        with Session.open(folder, make_model(memory, store), **options) as session:
            assert conditions.conditions_of(session) == names
