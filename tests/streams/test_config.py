"""Settings: layers, types, origins, and what is refused."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from wakesleep.streams.config import as_dict, flat, load_config, to_yaml
from wakesleep.streams.errors import Refused
from wakesleep.streams.stream_config import StreamConfig
from wakesleep.streams.values import parse_count, parse_literal


@dataclass(frozen=True, kw_only=True)
class Shelf:
    capacity: int = 64
    order: Literal["newest", "none"] = "newest"

    def __post_init__(self):
        if not 0 < self.capacity <= 1_000_000:
            raise ValueError(f"capacity must be 1 to 1,000,000, got {self.capacity}")


@dataclass(frozen=True, kw_only=True)
class Book:
    window: int = 256
    limit: int | float = math.inf
    rate: float = 0.5
    keep: bool = True
    path: str | None = None
    layers: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.99)
    shelf: Shelf = field(default_factory=lambda: Shelf(capacity=100))
    spare: Shelf | None = None
    free: dict[str, Any] = field(default_factory=lambda: {"steps": 3})

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


def load(*texts, yaml=None, session=None):
    return load_config(Book, yaml, texts, session)[0]


def refusal(*texts, yaml=None) -> str:
    with pytest.raises(Refused) as caught:
        load(*texts, yaml=yaml)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message


def test_each_layer_covers_the_one_below_and_says_so(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("window: 512\nshelf:\n  capacity: 7\nrate: 0.25\n")
    config, origins = load_config(
        Book, recipe, ["shelf.capacity=9"], {"rate": 0.125, "keep": False, "window": 1}
    )
    assert (config.window, config.shelf.capacity, config.rate, config.keep) == (512, 9, 0.25, False)
    assert origins["window"] == "file" and origins["shelf.capacity"] == "command line"
    assert origins["keep"] == "session" and origins["layers"] == "default"
    assert list(origins) == list(flat(config))


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("10k", 10_000), ("1.5M", 1_500_000), ("1e6", 1_000_000), ("10_000", 10_000)],
)
def test_counts_are_written_as_people_write_them(text, value):
    assert load(f"window={text}").window == value
    assert load(f"limit={text}").limit == value
    assert type(load(f"limit={text}").limit) is int


@pytest.mark.parametrize("text", ["2.5", "1e-3", "ten", "", "nan", "1e99999999", "10K", "1m", "-"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError):
        parse_count(text)


def test_infinity_is_legal_only_where_the_schema_allows_it():
    assert load("limit=10").limit == 10
    assert load("limit=10", "limit=inf").limit == math.inf
    assert "expected a whole number" in refusal("window=inf")


def test_every_type_is_read_from_text():
    config = load(
        "rate=1e-3", "keep=no", "path=none", "layers=3,4", "betas=[0.5, 1]", "shelf.order=none"
    )
    assert (config.rate, config.keep, config.path, config.layers) == (1e-3, False, None, (3, 4))
    assert config.betas == (0.5, 1.0) and config.shelf.order == "none"
    assert load("layers=").layers == ()
    assert load_config(type(load()), None, {"shelf.order": None})[0].shelf.order == "none"


def test_a_group_keeps_the_defaults_of_its_place():
    config = load("shelf.order=none")
    assert config.shelf == Shelf(capacity=100, order="none")
    assert load("spare.capacity=3").spare == Shelf(capacity=3)
    assert load("spare=none").spare is None


def test_free_keys_are_read_by_their_looks():
    free = load("free.a=1k", "free.b=false", "free.c=[1, x]", "free.d.e=1e-3").free
    assert free == {"steps": 3, "a": 1000, "b": False, "c": [1, "x"], "d.e": 1e-3}
    assert [parse_literal(text) for text in ("none", "bf16-mixed", "inf")] == [
        None,
        "bf16-mixed",
        math.inf,
    ]


@pytest.mark.parametrize("text", ["/x/${bad thing}/", "/x/${bad", "${oc.env:HOME}", "a$b"])
def test_dollars_in_a_file_are_text(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f'model: "{text}"\n')
    assert load_config(StreamConfig, tmp_path / "a.yaml")[0].model == text


def test_nothing_is_interpolated(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("path: ${window}\n")
    assert load(yaml=recipe).path == "${window}"
    assert load("path=${oc.env:HOME}").path == "${oc.env:HOME}"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("widnow=3", "window"),
        ("capacity=3", "shelf.capacity"),
        ("shelf.capcity=3", "shelf.capacity"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(text, near):
    assert f"did you mean {near}?" in refusal(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate=fast", "expected a number"),
        ("keep=7", "expected true or false"),
        ("shelf.order=oldest", "expected one of newest, none"),
        ("betas=1,2,3", "expected a list of 2"),
        ("shelf=3", "group of keys"),
        ("window=-1", "window must be at least 1, got -1"),
        ("shelf.capacity=1e18", "shelf.capacity must be 1 to 1,000,000"),
        ("nothing", "neither a file that exists nor key=value"),
    ],
)
def test_a_refusal_says_key_value_and_what_was_expected(text, words):
    message = refusal(text)
    assert words in message and text.partition("=")[0] in message


def test_a_refusal_says_where_the_value_came_from(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("keep: 3\n")
    assert str(recipe) in refusal(yaml=recipe)
    recipe.write_text("window: -2\n")
    assert "window is from the file" in refusal("keep=true", yaml=recipe)


def test_a_schema_without_a_default_asks_for_its_key():
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        task: str

    with pytest.raises(Refused, match="task: needed"):
        load_config(Needy)


@pytest.mark.parametrize(
    "text",
    ["- 1\n", "a: [\n", "window: 1\nwindow: 2\n", "path: !!python/name:os.system\n", "3: 4\n"],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert "recipe.yaml" in refusal(yaml=recipe)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "recipe.yaml").write_text("window: 1\n")
    assert "recipe.yaml?" in refusal(yaml=tmp_path / "recpie.yaml")


def test_a_file_of_the_wrong_kind_is_not_read_whole(tmp_path):
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    assert "larger than" in refusal(yaml=large)


def test_what_is_written_reads_back_the_same(tmp_path):
    config, origins = load_config(Book, None, ["limit=inf", "path=a: #b", "rate=1e-7", "free.x=2"])
    recipe = tmp_path / "recipe.yaml"
    for text in (to_yaml(config), to_yaml(config, origins)):
        recipe.write_text(text)
        assert load(yaml=recipe) == config
    assert load(session=json.loads(json.dumps(as_dict(config), allow_nan=False))) == config
    assert "rate: 1e-07" in to_yaml(config) and "# command line" in to_yaml(config, origins)
