"""The short convolution against a loop over tokens, ragged and cut anywhere."""

import pytest
import torch

from wakesleep.kernels.convolution import short_convolution

D, R = 5, 3


def loop(x, weight, tail, lengths):
    """One token and one lane at a time; padding gives zeros."""
    y, tail = torch.zeros_like(x), tail.clone()
    for lane, length in enumerate(lengths.tolist()):
        for t in range(length):
            rows = torch.cat([tail[lane], x[lane, t : t + 1]])
            y[lane, t] = (rows * weight.t()).sum(0)
            tail[lane] = rows[1:]
    return y, tail


def inputs(B, T):
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(D, R + 1, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(B, R, D, dtype=torch.float64, requires_grad=True)
    return x, weight, tail


def test_ragged_lanes_equal_the_token_loop():
    x, weight, tail = inputs(5, 6)
    lengths = torch.tensor([0, 1, 2, 5, 6])  # fewer than R tokens too: older inputs stay
    y, after = short_convolution(x, weight, tail, lengths)
    expected, expected_after = loop(x, weight, tail, lengths)
    real = torch.arange(6) < lengths[:, None]
    torch.testing.assert_close(y[real], expected[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(after, expected_after, rtol=0, atol=0)


def test_gradients_are_those_of_the_token_loop_and_padding_gets_none():
    x, weight, tail = inputs(3, 4)
    lengths = torch.tensor([4, 1, 0])
    real = (torch.arange(4) < lengths[:, None])[..., None]
    probe, probe_tail = torch.randn(3, 4, D).double(), torch.randn(3, R, D).double()

    def gradients(convolve):
        y, after = convolve(x, weight, tail, lengths)
        loss = (y.where(real, 0) * probe).sum() + (after * probe_tail).sum()
        return torch.autograd.grad(loss, (x, weight, tail))

    for a, b in zip(gradients(short_convolution), gradients(loop), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not gradients(short_convolution)[0].masked_select(~real).any()


@pytest.mark.parametrize("cuts", [[0, 9], [1] * 9, [2, 0, 1, 6], [8, 1]])
def test_any_split_equals_one_call(cuts):
    x, weight, tail = inputs(2, 9)
    y, after = short_convolution(x, weight, tail, torch.tensor([9, 9]))
    pieces, state = [], tail
    for piece in x.split(cuts, 1):
        out, state = short_convolution(piece, weight, state, torch.tensor([piece.shape[1]] * 2))
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), y, rtol=0, atol=0)
    torch.testing.assert_close(state, after, rtol=0, atol=0)


def test_bad_padding_never_reaches_the_tail():
    x, weight, tail = (t.detach() for t in inputs(1, 4))
    x[:, 2:] = float("nan")
    y, after = short_convolution(x, weight, tail, torch.tensor([2]))
    assert y[:, :2].isfinite().all() and after.isfinite().all()


def test_the_tail_keeps_its_dtype_and_y_takes_that_of_x():
    x, weight, tail = (t.detach().float() for t in inputs(2, 4))
    y, after = short_convolution(x.bfloat16(), weight, tail, torch.tensor([4, 4]))
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)


def test_a_tail_of_another_batch_is_refused():
    x, weight, tail = inputs(2, 4)
    with pytest.raises(ValueError, match="tail"):
        short_convolution(x, weight, tail[:1], torch.tensor([4, 4]))
