"""The chunk grid against a loop over lanes and tokens: ragged lengths, phases, nothing at all."""

from __future__ import annotations

import pytest
import torch

from wakesleep.ttl.grid import carry, gather, make_grid, scatter

C, BEFORE = 4, 6

# positions of the lanes, their lengths, columns of the call
CASES = {
    "one lane on the grid": ([8], [8], 8),
    "all lanes on the grid": ([0, 8, 4], [12, 12, 12], 12),
    "on the grid, one lane shorter": ([0, 8], [8, 4], 8),
    "on the grid, more columns than tokens": ([0, 8], [4, 4], 6),
    "same phase": ([5, 9, 1], [6, 6, 6], 6),
    "same phase, whole chunks": ([3, 7], [8, 8], 8),
    "every phase, ragged": ([0, 5, 2, 11], [7, 0, 9, 1], 9),
    "a lane closes one chunk, another none": ([3, 0], [1, 1], 1),
    "some read nothing": ([6, 4, 0], [0, 5, 0], 5),
    "all read nothing": ([6, 4, 0], [0, 0, 0], 3),
    "no columns": ([6, 4, 3], [0, 0, 0], 0),
    "ends at a boundary": ([2, 7], [6, 1], 6),
    "far into a stream": ([10**12 + 3, 2**40 + 1], [3, 6], 6),
}
cases = pytest.mark.parametrize(
    ("position", "lengths", "columns"), CASES.values(), ids=CASES.keys()
)
shapes = pytest.mark.parametrize("shape", [(), (2, 3)], ids=["numbers", "heads"])


def by_lane(position, lengths, x, opened):
    """Every lane's tokens since its open chunk began, as a list."""
    lanes = []
    for b, (start, length) in enumerate(zip(position, lengths, strict=True)):
        lanes.append([*opened[b, : start % C], *x[b, :length]])
    return lanes


def grid_of(position, lengths, columns):
    return make_grid(torch.tensor(position), torch.tensor(lengths), C, columns)


def numbers(*shape) -> torch.Tensor:
    """All different, none zero."""
    count = torch.Size(shape).numel()
    return (torch.randperm(count) + 1).view(shape)


@cases
def test_every_slot_belongs_to_the_position_that_it_stands_for(position, lengths, columns):
    grid = grid_of(position, lengths, columns)
    fresh = grid.fresh()
    for b, (start, length) in enumerate(zip(position, lengths, strict=True)):
        first = start - start % C
        assert int(grid.position[b]) == first and int(grid.phase[b]) == start - first
        slots = [first + i for i in range(grid.num_chunks * C)]
        assert [start <= p < start + length for p in slots] == fresh[b].tolist()
        assert int(grid.end[b]) == start + length - first
        assert int(grid.closed[b]) == (start + length) // C - start // C
    ends = [start % C + length for start, length in zip(position, lengths, strict=True)]
    assert grid.num_chunks == max(1, -(-max(ends) // C))
    whole = [
        start % C == 0 and length == columns > 0
        for start, length in zip(position, lengths, strict=True)
    ]
    assert grid.aligned == (all(whole) and columns % C == 0)


@cases
@shapes
def test_scattered_tokens_stand_behind_the_open_chunk(position, lengths, columns, shape):
    B = len(position)
    grid = grid_of(position, lengths, columns)
    x, opened = numbers(B, columns, *shape), -numbers(B, C, *shape)
    out = scatter(grid, x, opened)
    assert out.shape == (B, grid.num_chunks * C, *shape)
    for b, tokens in enumerate(by_lane(position, lengths, x, opened)):
        assert all(map(torch.equal, out[b], tokens))
        assert not out[b, len(tokens) :].any()
    held = scatter(grid, x != 0, opened != 0)  # of bools, too: empty slots are False
    assert torch.equal(held, out != 0)


@cases
@shapes
def test_gathered_tokens_are_those_of_the_call_in_its_order(position, lengths, columns, shape):
    B = len(position)
    grid = grid_of(position, lengths, columns)
    y = numbers(B, grid.num_chunks * C, *shape)
    out = gather(grid, y, columns)
    assert out.shape == (B, columns, *shape)
    for b, (start, length) in enumerate(zip(position, lengths, strict=True)):
        for t in range(length):
            assert torch.equal(out[b, t], y[b, start % C + t])
    x = numbers(B, columns, *shape)
    back = gather(grid, scatter(grid, x, torch.zeros(B, C, *shape, dtype=x.dtype)), columns)
    for b, length in enumerate(lengths):
        assert torch.equal(back[b, :length], x[b, :length])


@cases
@shapes
@pytest.mark.parametrize("before", [0, BEFORE])
def test_carried_is_the_open_chunk_and_what_stands_before_it(
    position, lengths, columns, shape, before
):
    B = len(position)
    grid = grid_of(position, lengths, columns)
    x, opened, older = (numbers(B, n, *shape) for n in (columns, C, before))
    y = torch.cat([older, scatter(grid, x, opened)], 1)
    out = carry(grid, y, before)
    assert out.shape == (B, before + C, *shape)
    for b, tokens in enumerate(by_lane(position, lengths, x, opened)):
        closed = (position[b] + lengths[b]) // C - position[b] // C
        seen = [*older[b], *tokens][closed * C :]
        assert all(map(torch.equal, out[b], seen))
        assert not out[b, len(seen) :].any()


def test_carrying_from_call_to_call_equals_one_call():
    """Two lanes, cut differently: the open chunk goes from hand to hand."""
    x = numbers(2, 21, 3)
    calls = [(3, 0), (1, 7), (0, 0), (9, 2), (4, 4), (2, 8), (2, 0)]
    position, opened, done = torch.zeros(2).long(), torch.zeros(2, C, 3).long(), [0, 0]
    for lengths in calls:
        tokens = torch.zeros(2, max(lengths), 3).long()
        for b, n in enumerate(lengths):
            tokens[b, :n] = x[b, done[b] : done[b] + n]
            done[b] += n
        grid = make_grid(position, torch.tensor(lengths), C, max(lengths))
        opened = carry(grid, scatter(grid, tokens, opened))
        position = position + torch.tensor(lengths)
    assert position.tolist() == [21, 21]
    whole = make_grid(torch.zeros(2).long(), position, C, 21)
    expected = carry(whole, scatter(whole, x, torch.zeros(2, C, 3).long()))
    assert torch.equal(opened, expected) and opened[:, 0].all() and not opened[:, 1:].any()


def test_gradients_reach_the_tokens_of_the_call_and_no_padding():
    position, lengths, columns = CASES["every phase, ragged"]
    grid = grid_of(position, lengths, columns)
    x = torch.randn(4, columns, 2, requires_grad=True)
    opened = torch.randn(4, C, 2, requires_grad=True)
    (scatter(grid, x, opened) * 2).sum().backward()
    for b, (start, length) in enumerate(zip(position, lengths, strict=True)):
        assert (x.grad[b, :length] == 2).all() and not x.grad[b, length:].any()
        assert (opened.grad[b, : start % C] == 2).all() and not opened.grad[b, start % C :].any()
