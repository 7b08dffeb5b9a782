"""Promises of the tokenizer: nothing is lost, no special id from text, cuts do not matter."""

import hashlib
import json
import random
from importlib.resources import files

import numpy as np
import pytest

from wakesleep.streams import tokenizer as module
from wakesleep.streams.errors import Refused
from wakesleep.streams.tokenizer import MAX_RUN, NUM_SPECIAL, SPECIAL_TOKENS, Tokenizer

PATH = files("wakesleep.streams") / "data" / "default" / "tokenizer.json"
# Long runs of both kinds, every kind of line end, exotic white space, several scripts, signs.
FRAGMENTS = (
    " ",
    "\n",
    "\r\n",
    "\t \v\f",
    "   ",
    "Ann Reed",
    " lives",
    "482913",
    "it's",
    " — “no”",
    "…!?",
    "<|end|>",
    "é́",
    "漢字カナ",
    "😀👩‍👩‍👧",
    "\u00a0\u2003\u2028\x1c",
    "½²",
    "\ufeff",
    "a" * (MAX_RUN - 1),
    "b" * (2 * MAX_RUN + 7),
    " " * (MAX_RUN + 3),
    "\n" * (3 * MAX_RUN),
    "1" * MAX_RUN,
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(PATH)


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(FRAGMENTS) for _ in range(draw.randint(0, 30)))


def random_pieces(draw: random.Random, text: str) -> list[str]:
    longest = draw.choice((1, 2, 5, 40, 700))
    pieces = []
    while text:
        size = draw.randint(0, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def streamed(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    return [i for ids in tokenizer.encode_stream(pieces) for i in ids.tolist()]


@pytest.mark.parametrize("block", [1, 7, 300, 65_536])
def test_ids_do_not_depend_on_where_the_pieces_are_cut(tokenizer, monkeypatch, block):
    draw = random.Random(block)
    for _ in range(60):
        text = random_text(draw)
        whole = tokenizer.encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BLOCK", block)  # what is held back now matters at every cut
            assert streamed(tokenizer, random_pieces(draw, text)) == whole
            assert streamed(tokenizer, list(text)) == whole


def test_text_survives_and_every_byte_is_counted(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        text = random_text(draw)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.to_bytes(ids) == text.encode()
        assert tokenizer.num_bytes(ids) == len(text.encode())


def test_units_are_safe_boundaries_for_the_merges_too(tokenizer):
    """Cutting before white space changes nothing even without our own split into units."""
    draw = random.Random(1)
    for _ in range(100):
        words = [draw.choice(FRAGMENTS[5:18]) + draw.choice((" ", "\n", "\r\n  ")) for _ in "12345"]
        text = "".join(words)
        assert tokenizer._engine.encode(text).ids == tokenizer.encode(text)


def test_text_never_becomes_a_special_id(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"{name} and{name}{name}\n{name}")
        assert min(ids) >= NUM_SPECIAL
    assert min(tokenizer.encode("".join(map(chr, range(0x3000))))) >= NUM_SPECIAL


def test_special_ids_stand_for_no_text(tokenizer):
    ids = [0, *tokenizer.encode("Ann"), 3, 7]
    assert tokenizer.decode(ids) == "Ann"
    assert tokenizer.num_bytes(ids) == 3


def test_every_digit_is_its_own_token(tokenizer):
    digits = tokenizer.encode("0123456789")
    assert len(set(digits)) == 10
    # A number reads the same at the start of a text, after a space and inside a word.
    assert tokenizer.encode(" 90210")[1:] == [digits[int(d)] for d in "90210"]
    assert tokenizer.encode("x7y")[1] == digits[7]


@pytest.mark.parametrize("word", "What Where Who When Which How The code gate lives moved".split())
def test_words_of_questions_are_single_tokens(tokenizer, word):
    assert len(tokenizer.encode(f" {word}")) == 1


@pytest.mark.parametrize("run", ["x" * 5_000, " " * 5_000, "x" * 5_000 + " y", "é" * 5_000])
def test_a_long_run_is_cut_at_fixed_distances_from_its_start(tokenizer, run):
    cut = [run[i : i + MAX_RUN] for i in range(0, 4 * MAX_RUN, MAX_RUN)]
    expected = [i for part in cut for i in tokenizer.encode(part)]
    assert tokenizer.encode(run)[: len(expected)] == expected
    # The distance counts from the run, not from the text.
    if not run.startswith(" "):
        shifted = tokenizer.encode("shift it " + run)
        assert shifted[-len(tokenizer.encode(run[MAX_RUN:])) :] == tokenizer.encode(run[MAX_RUN:])


def test_a_unit_is_looked_at_once_however_long_the_run(tokenizer, monkeypatch):
    """Linear cost, counted: characters that reach the merges, for runs and for tiny pieces."""
    for text in ("q" * 300_000, "\n" * 300_000, "zx " * 100_000):
        seen = []
        monkeypatch.setattr(
            Tokenizer,
            "_encode_units",
            lambda self, units, seen=seen: seen.append(sum(map(len, units))) or np.empty(0),
        )
        for _ in tokenizer.encode_stream([text[:99], *text[99:400], text[400:]]):
            pass
        assert sum(seen) == len(text)
        assert max(seen) <= 2 * module.BLOCK


def test_what_is_remembered_stays_bounded_and_changes_nothing(monkeypatch):
    text = " ".join(str(number) for number in range(3_000))
    expected = Tokenizer.load(PATH).encode(text)
    monkeypatch.setattr(module, "CACHED_UNITS", 100)
    monkeypatch.setattr(module, "BLOCK", 200)
    small = Tokenizer.load(PATH)
    assert small.encode(text) == expected
    assert len(small._cache) <= 100


def test_ids_of_another_vocabulary_are_refused_with_their_place(tokenizer):
    for ids in ([9, 4096, 9], [9, -1]):
        with pytest.raises(ValueError, match=r"0 \.\. 4095; position 1 holds"):
            tokenizer.num_bytes(ids)
        with pytest.raises(ValueError, match="position 1"):
            tokenizer.decode(np.array(ids))


def test_half_characters_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D"):
        tokenizer.encode("so \ud83d what")
    assert tokenizer.encode("so what")  # and nothing stays behind


def test_arrays_can_be_written_to(tokenizer):
    for ids in tokenizer.encode_stream(["one two"]):
        assert ids.dtype == np.int32 and ids.flags.writeable


def test_the_shipped_tokenizer_is_known_by_its_bytes(tokenizer):
    assert tokenizer.vocab_size == 4096
    assert tokenizer.json == PATH.read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(PATH.read_bytes()).hexdigest()


def damaged(change) -> bytes:
    tree = json.loads(PATH.read_bytes())
    change(tree)
    return json.dumps(tree).encode()


def make_a_special_token_of_text(tree):
    tree["model"]["vocab"].update({"<|en": 4096, "d|>": 4097})
    tree["model"]["merges"].append(["<|en", "d|>"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "form"),
        (b"\xff\xfe", "form"),
        (b"[" * 100_000, "form"),
        (b"{}", "form"),
        (damaged(lambda t: t.update(normalizer={"type": "NFKC"})), "normalizer"),
        (damaged(lambda t: t.update(added_tokens=[{"id": 0}])), "added tokens"),
        (damaged(lambda t: t["model"]["vocab"].update({"<|end|>": 9})), "ids"),
        (damaged(lambda t: t["model"]["vocab"].pop("Ġthe")), "ids, its merges"),
        (damaged(lambda t: t["model"]["merges"].append(["q", "\u4e00"])), "merges"),
        (damaged(lambda t: t["model"]["merges"].append([1, 2])), "merges"),
        (damaged(make_a_special_token_of_text), "its merges"),
        (damaged(lambda t: t["model"]["merges"].append(["q"])), "form"),
        (damaged(lambda t: t["model"]["merges"].append([[], []])), "form"),
        (damaged(lambda t: t["model"]["vocab"].update({"Ġthe": 300.0})), "ids"),
        (damaged(lambda t: t["model"]["vocab"].update({"\u4e00": 4096})), "not a byte"),
    ],
)
def test_a_strange_tokenizer_is_refused(content, reason):
    with pytest.raises(Refused, match=reason):
        Tokenizer(content)
