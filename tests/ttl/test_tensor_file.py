"""A tensor file is compared with what is expected before its numbers are read."""

import json

import pytest
import torch
from safetensors.torch import save

from wakesleep.ttl.files import open_regular
from wakesleep.ttl.tensor_file import MAX_HEADER_BYTES, Expected, read_tensors

EXPECTED = {
    "a": Expected((2, 3), [torch.float32, torch.float16]),
    "b": Expected((), [torch.int64]),
    "c": Expected((0, 4), [torch.bool]),
}
TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(-5),
    "c": torch.zeros(0, 4, dtype=torch.bool),
}


def read(path, data):
    path.write_bytes(data)
    with open_regular(path, 1 << 24) as file:
        return read_tensors(file, EXPECTED, "x.safetensors")


def pack(header, numbers=bytes(32)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {
    "a": entry("F32", [2, 3], 0, 24),
    "b": entry("I64", [], 24, 32),
    "c": entry("BOOL", [0, 4], 32, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_was_saved_is_read_back(dtype, tmp_path):
    given = {**TENSORS, "a": TENSORS["a"].to(dtype)}
    tensors, metadata = read(tmp_path / "x", save(given, metadata={"k": "v"}))
    assert metadata == {"k": "v"}
    for name, tensor in given.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def test_the_header_of_the_cases_below_is_good_but_for_one_thing(tmp_path):
    tensors, _ = read(tmp_path / "x", pack(GOOD))
    assert torch.equal(tensors["a"], torch.zeros(2, 3))


REFUSED = {
    "empty": (b"", "cut off"),
    "shorter than a length": (b"\x00" * 7, "cut off"),
    "header cut off": (pack(GOOD)[:40], "cut off"),
    "length beyond 63 bits": ((2**63).to_bytes(8, "little") + b"{}", "cut off"),
    "header too long": (pack(b" " * (MAX_HEADER_BYTES + 1)), "cut off"),
    "header not JSON": (pack(b"{"), "not plain JSON"),
    "header a list": (pack([]), "not a table"),
    "tensor a number": (pack({**GOOD, "a": 1}), "not a table"),
    "numbers cut off": (pack(GOOD, bytes(31)), "has .* bytes; its header stands for"),
    "numbers left over": (pack(GOOD, bytes(33)), "has .* bytes; its header stands for"),
    "tensor missing": (pack({"a": GOOD["a"]}, bytes(24)), "'b' is missing"),
    "tensor unknown": (
        pack({**GOOD, "d": entry("F32", [], 32, 36)}, bytes(36)),
        "'d' is unknown",
    ),
    "shape transposed": (
        pack({**GOOD, "a": entry("F32", [3, 2], 0, 24)}),
        r"shape \[3, 2\]; .* \[2, 3\]",
    ),
    "shape huge": (pack({**GOOD, "a": entry("F32", [2**40, 2**40], 0, 24)}), "has the shape"),
    "dtype wider": (pack({**GOOD, "a": entry("F64", [2, 3], 0, 48)}), "'a' is F64"),
    "range short": (pack({**GOOD, "a": entry("F32", [2, 3], 0, 20)}), "wrong byte range"),
    "range short, the next long": (
        pack({**GOOD, "a": entry("F32", [2, 3], 0, 20), "b": entry("I64", [], 20, 32)}),
        "'a' has a wrong byte range",
    ),
    "ranges overlap": (pack({**GOOD, "b": entry("I64", [], 16, 24)}), "wrong byte range"),
    "hole": (pack({**GOOD, "b": entry("I64", [], 32, 40)}, bytes(40)), "wrong byte range"),
    "range negative": (pack({**GOOD, "a": entry("F32", [2, 3], -24, 0)}), "wrong byte range"),
    "no range": (pack({**GOOD, "a": {"dtype": "F32", "shape": [2, 3]}}), "without a byte range"),
    "false for 0": (
        pack({**GOOD, "c": entry("BOOL", [False, 4], 32, 32)}),
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(case, tmp_path):
    data, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "x", data)


def test_a_shape_that_does_not_fit_is_refused_before_the_numbers_are_read(tmp_path):
    """The file claims and has 8 GB (with holes, so that the disk does not): nothing reads them."""
    path = tmp_path / "x"
    path.write_bytes(pack({**GOOD, "a": entry("F32", [2**31], 0, 2**33)}, b""))
    with open(path, "r+b") as file:
        file.truncate(2**33 + 400)
    with open_regular(path, 2**34) as file:
        with pytest.raises(ValueError, match="has the shape"):
            read_tensors(file, EXPECTED, "x")
        assert file.tell() < 1000
