"""Mining finds the tokens that score highest, wherever they are, and says how many do."""

import json

import numpy as np
import pytest
import torch

from wakesleep.streams.language_model import DEFAULT
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.ttl.model_io import TOKENIZER, load_model

LANES, RARE = 2, 77  # a token that the admission head is made to like


@pytest.fixture
def corpus(tmp_path):
    """6,000 tokens with a rare one every 500, but never in the first 100 of a lane."""
    ids = np.random.default_rng(0).integers(100, 4096, 6_000).astype(np.uint16)
    ids[250::500] = RARE
    path = tmp_path / "text.npy"
    np.save(path, ids)
    sha256 = Tokenizer.load(DEFAULT / TOKENIZER).sha256
    path.with_suffix(".json").write_text(json.dumps({"tokenizer_sha256": sha256}))
    return path


@pytest.fixture
def model(make_model):
    """The admission heads see the embedding of the first block's input alone."""
    model = load_model(make_model())
    store = next(b.attention.store for b in model.blocks if b.attention.store is not None)
    liked = torch.nn.functional.normalize(model.embedding.weight[RARE], dim=0)
    with torch.no_grad():
        for parameter in store.head.parameters():
            parameter.zero_()
        store.head[0].weight[0] = liked
        store.head[2].weight[:, 0] = 1.0
        for block in model.blocks:  # every branch silent: the store's input is the embedding
            block.attention.out.weight.zero_()
            block.mlp_out.weight.zero_()
            if block.memory is not None:
                block.memory.out.weight.zero_()
    return model


def stored_blocks(model):
    return [block for block in model.blocks if block.attention.store is not None]


def test_the_places_that_are_found_are_those_of_the_highest_scores(script, model, corpus):
    mine = script("mine_negatives").mine
    share, places = mine(model, corpus, tokens=6_000, lanes=LANES, per_head=12)
    assert places.tolist() == list(range(250, 6_000, 500))
    assert ((share > 0) & (share < 1)).all() and (share[1] >= share[0]).all()
    assert not any(block.attention.store.head._forward_hooks for block in stored_blocks(model))


def test_places_of_one_head_are_apart(script):
    highest = script("mine_negatives").highest
    positions, scores = np.arange(1_000), -np.abs(np.arange(1_000) - 500.0)
    found = highest(positions, scores, 4)
    assert found[0] == 500 and len(found) == 4
    assert np.diff(np.sort(found)).min() >= 64


def test_a_model_without_a_learned_store_is_refused(script, make_model):
    with pytest.raises(ValueError, match="no store with a learned admission head"):
        script("mine_negatives").Scores(load_model(make_model(store_layers=())))
