"""The script that made the shipped tokenizer makes the same one every time."""

import io
import lzma
import runpy
import tarfile
from pathlib import Path

from wakesleep.streams.tokenizer import NUM_SPECIAL, SPECIAL_TOKENS, Tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_tokenizer.py"


def names_archive(path: Path) -> Path:
    lists = {
        "first_name": [f"Given{chr(65 + i)}" for i in range(26)],
        "last_name": ["Reed"],
        "city": ["Rome, IT"],
    }
    with tarfile.open(path, "w") as tar:
        for name, lines in lists.items():
            content = "\n".join(lines).encode()
            info = tarfile.TarInfo(f"names/{name}.txt")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_training_twice_gives_the_same_usable_tokenizer(tmp_path):
    train = runpy.run_path(str(SCRIPT))["train"]
    (tmp_path / "a.txt").write_text("It was the best of times. " * 50)
    (tmp_path / "b.xz").write_bytes(lzma.compress("It was 1859, <|end|> naïve.\r\n".encode() * 50))
    sources = [tmp_path / "a.txt", tmp_path / "b.xz"]
    archive = names_archive(tmp_path / "names.tar")
    content = train(sources, archive, 1)
    assert train(sources, archive, 1) == content
    tokenizer = Tokenizer(content.encode())
    text = "Where does GivenA Reed live? In Rome, not in 1859. <|end|> 漢字"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids) >= NUM_SPECIAL
    assert len(tokenizer.encode(" Where")) == len(tokenizer.encode(" Rome")) == 1
    assert tokenizer.decode(range(len(SPECIAL_TOKENS))) == ""
