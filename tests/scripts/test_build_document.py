"""The bundled document is cut at the end of the word that holds its last wanted token."""

import runpy
from importlib.resources import files
from pathlib import Path

import pytest

from wakesleep.streams.tokenizer import Tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_document.py"
TEXT = (
    "Électricité: 漢字, an 1801 encyclopaedia\r\n\r\nof unbelievably longwinded articles 😀😀. " * 9
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(files("wakesleep.streams") / "data" / "default" / "tokenizer.json")


def test_a_cut_is_the_shortest_start_with_more_tokens(tokenizer):
    cut = runpy.run_path(str(SCRIPT))["cut"]
    total = len(tokenizer.encode(TEXT))
    for wanted in range(0, total, 7):
        text, count = cut(TEXT, tokenizer, wanted)
        assert TEXT.startswith(text)
        assert count == len(tokenizer.encode(text)) > wanted
        assert text == TEXT or TEXT[len(text)].isspace()
        shorter = text.rstrip().rsplit(maxsplit=1)[0] if len(text.split()) > 1 else ""
        assert len(tokenizer.encode(shorter)) <= wanted
    with pytest.raises(ValueError, match=f"hold {total:,} tokens, more than {total:,} are needed"):
        cut(TEXT, tokenizer, total)
