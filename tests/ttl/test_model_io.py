"""A model folder gives the model back; a folder that was tampered with is refused by name."""

import dataclasses
import hashlib
import json
import math
import os
import shutil

import pytest
import torch

from wakesleep.ttl import model_io
from wakesleep.ttl.memory import MemoryConfig
from wakesleep.ttl.model import ModelConfig, TTLModel
from wakesleep.ttl.model_io import load_model, model_sha256, save_model
from wakesleep.ttl.store import StoreConfig

CONFIG = ModelConfig(
    vocab_size=32,
    dim=16,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    window=8,
    chunk=4,
    memory_layers=(0,),
    store_layers=(1,),
    memory=MemoryConfig(kind="matrix", huber=math.inf),
    store=StoreConfig(capacity=8, hidden=8),
)
TOKENIZER = b'{"version": "1.0"}'


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TTLModel(CONFIG).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "new" / "folder"
    save_model(folder, model, TOKENIZER, "# A card\n", half=False)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A folder of this test's own, to spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


def test_a_model_in_full_precision_comes_back_bit_for_bit(model, saved):
    loaded = load_model(saved)
    assert loaded.config == CONFIG and not loaded.training
    assert same(loaded, model)
    tokens = torch.randint(32, (2, 11))
    with torch.no_grad():
        one, other = (m(tokens, m.init_state(2))[0] for m in (model, loaded))
    assert torch.equal(one, other)


def test_half_precision_is_half_the_size_and_float32_again_in_memory(model, saved, tmp_path):
    save_model(tmp_path, model, TOKENIZER, "")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, saved)]
    assert sizes[0] < 0.65 * sizes[1]
    loaded = load_model(tmp_path)
    for tensor, original in zip(loaded.parameters(), model.parameters(), strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, original.half().float())


def test_the_asked_dtype_is_the_one_in_memory(saved):
    assert {p.dtype for p in load_model(saved, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


def test_a_model_in_another_dtype_is_stored_in_one_that_loads(tmp_path):
    save_model(tmp_path, TTLModel(CONFIG).double(), TOKENIZER, "", half=False)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def test_loading_draws_no_random_number(saved):
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_holds_the_card_the_tokenizer_and_plain_json(saved):
    assert sorted(os.listdir(saved)) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
    )
    assert (saved / "tokenizer.json").read_bytes() == TOKENIZER
    assert (saved / "README.md").read_text() == "# A card\n"
    assert json.loads((saved / "config.json").read_text())["model"]["store"]["capacity"] == 8


def test_the_hash_of_the_weights_file_names_weights_and_config(model, saved, tmp_path):
    data = (saved / "model.safetensors").read_bytes()
    assert model_sha256(saved) == hashlib.sha256(data).hexdigest()
    other = TTLModel(ModelConfig(**{**vars(CONFIG), "window": 16}))
    other.load_state_dict(model.state_dict())
    assert save_model(tmp_path, other, TOKENIZER, "", half=False) != model_sha256(saved)


def test_tied_weights_are_stored_once_and_stay_tied(monkeypatch, tmp_path):
    class Tied(TTLModel):
        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(config.dim, config.vocab_size, bias=False)
            self.head.weight = self.embedding.weight

    monkeypatch.setattr(model_io, "TTLModel", Tied)
    model = Tied(CONFIG)
    save_model(tmp_path, model, TOKENIZER, "", half=False)
    loaded = load_model(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    assert same(loaded, model)


@pytest.mark.parametrize(("value", "half"), [(7e4, True), (torch.nan, True), (torch.inf, False)])
def test_weights_that_would_not_come_back_are_not_written(value, half, tmp_path):
    model = TTLModel(CONFIG)
    with torch.no_grad():
        model.norm.weight[3] = value
    with pytest.raises(ValueError, match=r"norm\.weight has values that are not finite"):
        save_model(tmp_path / "new", model, TOKENIZER, "", half=half)
    assert not (tmp_path / "new").exists()


def edit(change):
    """Spoil `config.json` through its parsed form."""

    def spoil(folder):
        path = folder / "config.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return spoil


def flip(name):
    """Spoil one bit in the middle of a file."""

    def spoil(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return spoil


def link(name):
    def spoil(folder):
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return spoil


def cut(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)


def weights_of_another_model(folder):
    """Consistent in sizes and hashes, but of other shapes than the config says."""
    record = json.loads((folder / "config.json").read_text())
    other = TTLModel(ModelConfig(**{**vars(CONFIG), "mlp_dim": 24}))
    save_model(folder, other, TOKENIZER, "", half=False)
    files = json.loads((folder / "config.json").read_text())["files"]
    (folder / "config.json").write_text(json.dumps({**record, "files": files}))


SPOILED = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "No such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
    "config is a link": (link("config.json"), "a link"),
    "weights are a link": (link("model.safetensors"), "a link"),
    "tokenizer is a link": (link("tokenizer.json"), "a link"),
    "bit flipped in the weights": (flip("model.safetensors"), "safetensors was changed"),
    "bit flipped in the tokenizer": (flip("tokenizer.json"), "tokenizer.json was changed"),
    "weights cut off": (cut, "100 bytes; recorded are"),
    "weights of another model": (weights_of_another_model, "has the shape .* the config says"),
    "config is a pickle": (
        lambda folder: (folder / "config.json").write_bytes(b"\x80\x04."),
        "not plain JSON",
    ),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "schema"),
    "config is huge": (
        lambda folder: (folder / "config.json").write_text(" " * 10**6),
        "1,000,000 bytes; at most",
    ),
    "another schema": (edit(lambda r: r.update(schema=99)), "schema 99; this version reads 1"),
    "an unknown part": (edit(lambda r: r.update(code="x")), "schema, model and files"),
    "an unknown file": (edit(lambda r: r["files"].update({"../x": {}})), "files must name"),
    "a hash that is none": (
        edit(lambda r: r["files"]["tokenizer.json"].update(sha256="../x")),
        "must hold bytes and sha256",
    ),
    "an unknown key": (edit(lambda r: r["model"].update(widow=8)), "nearest is 'window'"),
    "a class name": (edit(lambda r: r["model"].update(_target_="os.system")), "no such key"),
    "a huge width": (edit(lambda r: r["model"].update(dim=2**30)), "dim must be between"),
    "many layers": (edit(lambda r: r["model"].update(num_layers=10**9)), "num_layers must be"),
    "another window": (edit(lambda r: r["model"].update(window=16)), "is not the config that"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_was_tampered_with_is_refused(case, copy):
    spoil, words = SPOILED[case]
    spoil(copy)
    with pytest.raises(ValueError, match=words) as error:
        load_model(copy)
    assert len(str(error.value).splitlines()) <= 3


def test_a_state_that_no_machine_could_hold_is_refused_before_it_is_made(copy):
    """Every value is inside its own bounds; their product is not."""

    def grow(record):
        record["model"] |= {"window": 2**17, "num_heads": 256, "head_dim": 1024}

    edit(grow)(copy)
    with pytest.raises(ValueError, match="the state of one stream would take"):
        load_model(copy)


def test_a_save_that_was_killed_is_never_misread(saved, monkeypatch, tmp_path):
    """Between any two files of an overwritten folder, loading refuses or gives the old model."""
    writes = []

    def killed_before(folder, count):
        writes.clear()

        def write(path, data):
            if len(writes) == count:
                raise KeyboardInterrupt
            writes.append(path)
            path.write_bytes(data)

        return write

    new = TTLModel(CONFIG)
    for count in range(4):
        folder = shutil.copytree(saved, tmp_path / str(count))
        monkeypatch.setattr(model_io, "write_atomically", killed_before(folder, count))
        with pytest.raises(KeyboardInterrupt):
            save_model(folder, new, TOKENIZER, "", half=False)
        if count == 0:
            load_model(folder)
        else:
            with pytest.raises(ValueError, match="was changed"):
                load_model(folder)


@pytest.mark.parametrize("half", [True, False])
def test_what_fast_weights_know_of_keys_is_saved_however_many_were_seen(tmp_path, half):
    torch.manual_seed(2)
    model = TTLModel(dataclasses.replace(CONFIG, fast_layers=(1,))).eval()
    space, rows = model.blocks[1].attention.fast.space, torch.randn(2, 50, 17).double()
    rows[..., -1] = 1
    q, k = rows[..., [*range(8), -1]], rows[..., 8:]
    space.follow(1e5 * k.mT @ k, q.mT @ rows)  # five million keys, more than float16 can count
    save_model(tmp_path, model, TOKENIZER, "", half=half)
    again = load_model(tmp_path).blocks[1].attention.fast.space
    assert torch.equal(again.counts, space.counts) and int(again.counts.max()) == 5_000_000
    for (name, saved), (_, own) in zip(again.named_buffers(), space.named_buffers(), strict=True):
        close = {"rtol": 1e-3 * half, "atol": 1e-3 * half}
        torch.testing.assert_close(saved, own, **close, msg=name)
    assert not torch.equal(again.key_map[0], again.key_map[1])
