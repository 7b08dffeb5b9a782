"""State files: bit for bit, readable by others, and refused before anything is allocated."""

from typing import NamedTuple

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from wakesleep.ttl import state_io
from wakesleep.ttl.state import flatten, map_state
from wakesleep.ttl.state_io import load_state, save_state


class Part(NamedTuple):
    half: torch.Tensor
    flags: torch.Tensor


class Tree(NamedTuple):
    weights: tuple[torch.Tensor, ...]
    absent: None
    part: Part
    ids: torch.Tensor
    empty: torch.Tensor


@pytest.fixture
def tree() -> Tree:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return Tree(
        weights=(odd, torch.randn(3, 4, dtype=torch.float64).t()),  # the second: not contiguous
        absent=None,
        part=Part(torch.randn(5).bfloat16(), torch.tensor([True, False, True])),
        ids=torch.tensor([[2**62, -1]]),
        empty=torch.zeros(1, 0, 7, dtype=torch.int32),
    )


def raw(tree):
    return {
        name: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist())
        for name, t in flatten(tree).items()
    }


def meta(tree):
    return map_state(lambda t: t.to("meta"), tree)


def test_a_state_comes_back_bit_for_bit(tree, tmp_path):
    save_state(tmp_path / "s", tree, {"model": "m"})
    loaded, header = load_state(tmp_path / "s", meta(tree))
    assert raw(loaded) == raw(tree)
    assert loaded.absent is None and header == {"model": "m"}


def test_equal_states_give_equal_files(tree, tmp_path):
    save_state(tmp_path / "a", tree, {"x": "1", "y": "2"})
    save_state(tmp_path / "b", map_state(torch.clone, tree), {"x": "1", "y": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_safetensors_that_numpy_can_read(tree, tmp_path):
    """There is no bfloat16 in numpy; float32 holds the same numbers."""
    save_state(tmp_path / "s", tree, {})
    found = load_file(tmp_path / "s")
    wide = tree._replace(part=tree.part._replace(half=tree.part.half.float()))
    assert {n: list(t.tobytes()) for n, t in found.items()} == {
        n: bits for n, (_, _, bits) in raw(wide).items()
    }


@pytest.mark.parametrize(
    "change",
    [
        {"ids": torch.zeros(1, 3, dtype=torch.int64)},
        {"ids": torch.zeros(1, 2, dtype=torch.int32)},
        {"empty": torch.zeros(1, 0, 8, dtype=torch.int32)},
        {"absent": torch.zeros(1)},
    ],
    ids=["shape", "dtype", "empty shape", "unknown name"],
)
def test_other_tensors_than_expected_are_refused(tree, tmp_path, change):
    save_state(tmp_path / "s", tree._replace(**change), {})
    with pytest.raises(ValueError, match=next(iter(change))):
        load_state(tmp_path / "s", meta(tree))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_refused(tree, tmp_path, keep):
    save_state(tmp_path / "s", tree, {})
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:keep])
    with pytest.raises(ValueError, match="s"):
        load_state(tmp_path / "s", meta(tree))


def test_another_schema_is_refused_with_both(tree, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(state_io, "SCHEMA", 99)
        save_state(tmp_path / "s", tree, {})
    with pytest.raises(ValueError, match=r"schema '99'.*schema '1'"):
        load_state(tmp_path / "s", meta(tree))


def test_a_file_of_weights_is_no_state(tree, tmp_path):
    tree = tree._replace(part=tree.part._replace(half=torch.zeros(5)))
    tensors = {name: t.contiguous() for name, t in flatten(tree).items()}
    save_file(tensors, tmp_path / "s")
    with pytest.raises(ValueError, match="wakesleep state"):
        load_state(tmp_path / "s", meta(tree))


def test_a_link_is_not_followed(tree, tmp_path):
    save_state(tmp_path / "s", tree, {})
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with pytest.raises(ValueError, match="link"):
        load_state(tmp_path / "link", meta(tree))
