"""What a run begins with: the weights of another model, and sequences that can be made."""

from __future__ import annotations

from wakesleep.streams.config import flat
from wakesleep.streams.errors import Refused
from wakesleep.streams.language_model import DEFAULT
from wakesleep.streams.training_config import TrainConfig
from wakesleep.streams.training_data import Source
from wakesleep.ttl.model import TTLModel
from wakesleep.ttl.model_io import load_model

FREE = {"window", "store.capacity", "store_layers"}  # keys of a model that may be other ones
TRIED = 16  # sequences that are made before a run begins, to see whether they can be


def try_mixture(source: Source, config: TrainConfig) -> None:
    """Refuse sequences without room for what they are made of; other tasks know their length."""
    try:
        for number in range(-(-TRIED // config.train.lanes)):
            source.batch(number)
    except ValueError as error:
        what = f"train.sequence_len={config.train.sequence_len} is too short for data.kind=mixture"
        raise Refused(what, str(error), "Take longer sequences.") from error


def start_from(model: TTLModel, config: TrainConfig) -> None:
    """Take the weights of a model folder; optimiser and data begin afresh.

    The window and the store's capacity may be other ones: no weight depends on them. Layers
    may lack the memory, the store or the fast weights that they have there: a twin without a part.
    They may have a store that they lack there: it is read as the window is, and has to learn what
    it keeps. They may have fast weights that they lack there: until something is written, these say
    nothing. And those may be of another kind: the read has the same weights. Newer keys may lower
    older ones that they do not lower there: by nothing at first.
    """
    shipped = config.train.start == "default"
    found = load_model(DEFAULT if shipped else config.train.start)
    before, now = flat(found.config), flat(config.model)
    for key in sorted((before.keys() | now.keys()) - FREE):
        parts = ("memory_layers", "fast_layers")
        fewer = key in parts and set(now[key]) <= set(before[key])
        fast = before["fast_layers"] and now["fast_layers"]
        unread = key.startswith("fast.") and (key != "fast.write" or not fast)
        unread = unread or (key == "fast_layers" and not before[key])
        unread = unread or (key == "store.newer" and now[key])
        if before.get(key) != now.get(key) and not fewer and not unread:
            raise Refused(
                f"model.{key} is {before.get(key)} there and {now.get(key)} here",
                f"train.start={config.train.start}",
                "Start from a model of the same config.",
            )
    there = found.state_dict()
    model.load_state_dict({name: there.get(name, own) for name, own in model.state_dict().items()})
