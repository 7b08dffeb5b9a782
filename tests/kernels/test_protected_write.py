"""The protected write against its derivation, the ridge fit to all pairs, and plain passes."""

import pytest
import torch
import torch.nn.functional as F

from wakesleep.kernels.protected_write import (
    delta_passes,
    joint_ridge,
    protected_write,
    protected_write_reference,
)

LAM = 0.05
DRAWS, WIDTH = 20, 64  # of the recall tables


def pairs(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def earlier(k, v):
    """The state after `k`, `v`."""
    return joint_ridge(k, v, LAM), k.mT @ k


def recall(s, k, v, among) -> float:
    """Share of the pairs whose value is the nearest one `among` all."""
    near = (F.normalize(k @ s, dim=-1) @ among.mT).amax(-1)
    return ((k @ s * v).sum(-1) / (k @ s).norm(dim=-1) >= near - 1e-12).double().mean().item()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_pairs", [1, 3, 9])
def test_write_and_its_gradients_equal_the_derivation(num_pairs, weighted):
    s, root, k, v = leaves = [
        torch.randn(2, rows, width, dtype=torch.float64, requires_grad=True)
        for rows, width in ((5, 3), (4, 5), (num_pairs, 5), (num_pairs, 3))
    ]
    forms = (protected_write, protected_write_reference)
    weight = torch.rand(2, num_pairs).double() + 0.5 if weighted else None
    fast, slow = (write(s, root.mT @ root, k, v, LAM, weight) for write in forms)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    one, two = (torch.autograd.grad(sum(x.sin().sum() for x in y), leaves) for y in (fast, slow))
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cuts", [(40,), (8,) * 5, (1,) * 40, (3, 30, 7)])
def test_any_blocks_give_the_ridge_fit_to_all_pairs(cuts):
    k, v = pairs(3, 60, 16), torch.randn(3, 60, 7, dtype=torch.float64)
    state, at = earlier(k[:, :20], v[:, :20]), 20
    for size in cuts:
        state = protected_write(*state, k[:, at : at + size], v[:, at : at + size], LAM)
        at += size
    torch.testing.assert_close(state[0], joint_ridge(k, v, LAM), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("old", "new", "passes", "gentle"),
    [(32, 16, 0.99, 1.0), (48, 16, 0.97, 1.0), (32, 64, 0.01, 0.78), (48, 64, 0.01, 0.61)],
)
def test_old_and_new_pairs_are_recalled_where_passes_erase_the_old(old, new, passes, gentle):
    """Shares that plain passes keep of the old pairs: with step 1 and with step 0.2."""
    k, v = pairs(DRAWS, old + new, WIDTH), pairs(DRAWS, old + new, WIDTH)
    k_old, v_old, k_new, v_new = k[:, :old], v[:, :old], k[:, old:], v[:, old:]
    before = earlier(k_old, v_old)
    after = protected_write(*before, k_new, v_new, LAM)[0]
    assert recall(after, k_old, v_old, v) == recall(after, k_new, v_new, v) == 1.0
    for step, kept in ((1.0, passes), (0.2, gentle)):
        worn = delta_passes(before[0], k_new, v_new, step, num_passes=8)
        assert recall(worn, k_new, v_new, v) > 0.99
        assert recall(worn, k_old, v_old, v) == pytest.approx(kept, abs=0.08)


def test_more_pairs_than_a_linear_memory_holds_are_recalled_as_the_ridge_fit_recalls_them():
    k, v = pairs(4, 256, WIDTH), pairs(4, 256, WIDTH)
    after = protected_write(*earlier(k[:, :128], v[:, :128]), k[:, 128:], v[:, 128:], LAM)[0]
    ceiling = recall(joint_ridge(k, v, LAM), k, v, v)
    assert recall(after, k, v, v) == pytest.approx(ceiling, abs=1e-9)
    assert 0.8 < ceiling < 1.0


def test_rows_of_zeros_write_nothing():
    k, v = pairs(2, 6, 8), torch.randn(2, 6, 8, dtype=torch.float64)
    before = earlier(pairs(2, 3, 8), pairs(2, 3, 8))
    k[0, 2:], v[0, 2:] = 0, 0
    padded = protected_write(*before, k, v, LAM)
    alone = protected_write(*(t[:1] for t in before), k[:1, :2], v[:1, :2], LAM)
    nothing = protected_write(*before, 0 * k, 0 * v, LAM)
    for a, b, c, d in zip(padded, alone, nothing, before, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=0, atol=1e-12)
        assert torch.equal(c, d)


def test_a_pair_that_is_written_again_changes_little_and_another_value_means_both():
    k, v = pairs(1, 1, 8), pairs(1, 2, 8)
    once = protected_write(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), k, v[:, :1], LAM)
    again = protected_write(*once, k, v[:, :1], LAM)
    assert (k @ (again[0] - once[0]).double()).norm() < LAM
    both = protected_write(*once, k, v[:, 1:], LAM)
    torch.testing.assert_close(k @ both[0].double(), v.mean(1, keepdim=True), rtol=0, atol=LAM)


def test_a_value_that_weighs_more_replaces_the_old_one_and_the_others_stay():
    k, v, other = pairs(1, 30, WIDTH), pairs(1, 30, WIDTH), pairs(1, 3, WIDTH)
    weight = torch.full((1, 3), 20.0)
    after, covariance = protected_write(*earlier(k, v), k[:, -3:], other, LAM, weight)
    torch.testing.assert_close(covariance, k.mT @ k + k[:, -3:].mT @ k[:, -3:])
    told, old = k[:, -3:] @ after, v[:, -3:]
    assert torch.cosine_similarity(told, other, dim=-1).min() > 0.99
    assert torch.cosine_similarity(told, old, dim=-1).abs().max() < 0.45
    exchanged = torch.cat([v[:, :-3], other], 1)
    assert recall(after, k, exchanged, torch.cat([v, other], 1)) == 1.0


def test_a_thousand_writes_in_float32_stay_with_those_in_float64():
    k, v = pairs(1, 8_000, 16), pairs(1, 8_000, 16)
    states = [
        (torch.zeros(1, 16, 16, dtype=dtype), torch.zeros(1, 16, 16, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    ]
    for at in range(0, 8_000, 8):
        states = [protected_write(*s, k[:, at : at + 8], v[:, at : at + 8], LAM) for s in states]
    assert states[0][0].dtype == torch.float32
    assert (states[0][0] - states[1][0]).abs().max() < 1e-5
