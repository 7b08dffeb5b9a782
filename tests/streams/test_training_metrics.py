"""Numbers for people are those of the definition, and a sample is what was really answered."""

import math

import numpy as np
import pytest
import torch

from wakesleep.streams.mqar import MQAR, MQARConfig
from wakesleep.streams.prompts import encode_answer, encode_question
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import Tasks, open_tokenizer
from wakesleep.streams.training_metrics import Means, add_losses, line, measured
from wakesleep.streams.training_samples import sample_answer
from wakesleep.streams.training_text import TextLanes, since_repeat
from wakesleep.streams.unroll import TokenLoss


def losses(batch, **parts) -> TokenLoss:
    """The losses of a batch that was answered without fault."""
    nothing = torch.zeros_like(batch.weight)
    whole = {
        "loss": torch.tensor(1.0),
        "nats": nothing,
        "blind": torch.tensor(math.nan),
        "said": batch.targets,
        "right": nothing.bool(),
        "stale": nothing.bool(),
    }
    return TokenLoss(**(whole | parts))


def test_repeats_are_found_where_three_ids_come_again():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, 300)
    last, wanted = {}, np.zeros(300, np.int64)
    for i in range(2, 300):
        triple = tuple(ids[i - 2 : i + 1])
        wanted[i] = i - last[triple] if triple in last else 0
        last[triple] = i
    assert np.array_equal(since_repeat(ids), wanted)
    assert not since_repeat(ids[:3]).any()


def test_bits_per_byte_count_the_bytes_of_the_targets_and_of_far_ones_apart():
    ids = np.array([5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 9])
    batch = TextLanes([ids], 1, 7, 2, 0, held_out=True).batch(0)
    assert batch.targets[0, :13].tolist() == ids[1:].tolist()
    assert batch.repeat[0].tolist() == [0] * 8 + [7, 0, 0, 3, 0, 0]
    nats = torch.rand(1, 14, generator=torch.Generator().manual_seed(0)) * batch.weight
    lengths = torch.arange(10)
    means = Means(measured(()))
    add_losses(means, batch, losses(batch, nats=nats), lengths, reach=4)
    found = means.take()
    assert found["loss_rest"] == pytest.approx(float(nats.sum()) / 13)
    whole = float(nats.sum()) / math.log(2) / sum(ids[1:])
    assert found["bits_per_byte"] == pytest.approx(whole)
    assert found["bits_per_byte_far"] == pytest.approx(float(nats[0, 8]) / math.log(2) / 7)


def test_ids_without_text_have_no_bits_per_byte():
    batch = Tasks(MQAR(MQARConfig(pairs=4, queries=4, vocab_size=32), 32, 0), 2, 1).batch(0)
    means = Means(measured(MQAR.kinds))
    add_losses(means, batch, losses(batch, nats=batch.weight * 2), None, reach=4)
    assert means.take() == {"loss": 1.0, "loss_answers": 2.0}


def test_a_sample_is_the_answer_to_the_oldest_fact():
    task = Tasks(MQAR(MQARConfig(pairs=4, queries=4, vocab_size=32), 32, 0), 2, 1)
    batch = task.batch(0)
    oldest = int(batch.answers.age.argmax())
    lane, column = int(batch.answers.lane[oldest]), int(batch.answers.start[oldest])
    key, value = int(batch.tokens[lane, column]), int(batch.targets[lane, column])
    said = batch.targets.clone()
    text = f"token {key} '[{value}]', {int(batch.answers.age.max())} tokens ago"
    assert sample_answer(batch, losses(batch), None) == f"{text}: right"
    said[lane, column] = 7
    assert sample_answer(batch, losses(batch, said=said), None) == f"{text}: told '[7]'"


def test_a_sample_of_text_reads_like_text():
    tokenizer = open_tokenizer(TrainConfig())
    question = encode_question(tokenizer, "Where does Ada live?")
    answer, other = (encode_answer(tokenizer, word) for word in ("Turin", None))
    task = Tasks(MQAR(MQARConfig(pairs=4, queries=4, vocab_size=32), 32, 0), 1, 1)
    batch = task.batch(0)
    row = torch.tensor([[*question, *answer]])
    start, stop = len(question) - 1, row.shape[1] - 1
    places = [torch.tensor([n]) for n in (0, start, stop, 1500, 0)]
    batch = batch._replace(
        tokens=row, targets=row.roll(-1, 1), answers=type(batch.answers)(*places)
    )
    told = batch.targets.clone()
    told[0, start : start + len(other)] = torch.tensor(other)
    found = sample_answer(batch, losses(batch, said=told), tokenizer)
    assert found == "Where does Ada live? 'Turin', 1,500 tokens ago: told nothing"


def test_a_line_tells_how_well_text_is_predicted_once_that_was_validated():
    row = {"loss": 2.5, "tokens_per_second": 1500.0}
    assert line(20, 700, row, 120.0) == "step 20/700  loss 2.500  1,500 tokens/s  2.0 min left"
    assert "val bits per byte 1.666" in line(20, 700, row | {"val_bits_per_byte": 1.6662}, 120.0)
