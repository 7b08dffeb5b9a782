"""The table of pairs that outlive the store."""

import dataclasses

import torch

from wakesleep.streams.config import load_config
from wakesleep.streams.language_model import DEFAULT
from wakesleep.streams.train_command import find_recipe
from wakesleep.streams.training_config import TrainConfig
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import TOKENIZER, save_model


def test_every_key_is_said_once_with_its_value_behind_it_and_leaves_the_window(script):
    pairs = script("sleep_pairs").draw(num_pairs=40, gap=3, lanes=2, vocab_size=200, window=24)
    assert pairs.key.unique(dim=1).shape == (2, 40) and pairs.tokens.shape == (2, 256)
    for tokens, keys, values in zip(*pairs, strict=True):
        at = (tokens[:, None] == keys).nonzero()
        assert len(at) == 40 and int(at[:, 0].max()) < 256 - 2 * 24
        assert torch.equal(tokens[at[:, 0] + 1], values[at[:, 1]])
        assert int((tokens > 0).sum()) == 80


def test_each_question_is_asked_of_the_state_of_its_own_lane(script):
    module = script("sleep_pairs")
    key, value = torch.tensor([[3, 4], [4, 3]]), torch.tensor([[7, 8], [9, 6]])
    told = torch.full((2, 10), -1)
    told[0, 3], told[0, 4], told[1, 4], told[1, 3] = 7, 8, 9, 5  # the last one is wrong

    def model(tokens, lanes):
        said = told[lanes, tokens[:, 0]]
        return torch.nn.functional.one_hot(said, 10)[:, None].float(), None, None

    assert module.recall(model, torch.tensor([0, 1]), module.Pairs(key, key, value)) == (3, 4)


def test_a_table_has_all_rows_and_all_at_once_are_in_the_fast_weights(
    script, tmp_path, monkeypatch, capsys
):
    module = script("sleep_pairs")
    config, _ = load_config(TrainConfig, find_recipe("configs/pairs.yaml"), ["model.dim=16"])
    torch.manual_seed(0)
    model = TTLModel(dataclasses.replace(config.model, head_dim=16, mlp_dim=16)).eval()
    tokenizer = (DEFAULT / TOKENIZER).read_bytes()
    save_model(tmp_path / "model", model, tokenizer, "# Random weights", half=False)
    words = ["x", str(tmp_path / "model"), "--store", "8", "--times", "1", "--lanes", "1"]
    monkeypatch.setattr("sys.argv", words)
    module.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    names = ["", "awake", "equal bytes, matrix", "matrix", "at once, matrix"]
    names += ["equal bytes, mlp", "mlp", "at once, mlp"]
    assert [row[0].strip("| ") for row in rows] == names
    assert rows[1][1] == "8" and int(rows[2][1]) > 8 and float(rows[3][5].strip(" |")) > 0
    pairs = module.draw(8, 4, 1, config.model.vocab_size, 40)
    with torch.no_grad():
        state = module.at_once(model, pairs, model.init_state(1, capacity=8))
        full, _ = module.read(model, pairs, 256, None)
    store = full.blocks[1].store
    k, v, _ = module.readable(store)
    value = pairs.tokens[0, store.position[0, 0].clamp(min=0)] >= 2048
    told = k @ state.blocks[1].fast.s
    near = torch.cosine_similarity(told, v, dim=-1)[0, 0]
    assert int(value.sum()) == 8 and near[value].min() > 0.9
    mlp = module.with_kind(tmp_path / "model", "mlp")
    old = module.at_once(mlp, pairs, mlp.init_state(1, capacity=8)).blocks[1].fast.old
    assert (old.open.sum(-1) == 8).all()  # the softmax sees all of them
