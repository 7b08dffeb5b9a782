"""Nothing is timed that computes something else; turns are fair, and memory is a process's own."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from wakesleep.streams import (
    bench_attention,
    bench_layers,
    bench_measure,
    bench_models,
    bench_titans,
    bench_work,
)
from wakesleep.streams.bench_cases import Entry, Group, groups
from wakesleep.streams.bench_config import BenchConfig
from wakesleep.streams.bench_measure import Contender, Unequal, in_turn, peak_of, touch
from wakesleep.streams.bench_process import Failed, Processes
from wakesleep.streams.bench_rows import faults_of
from wakesleep.streams.bench_training import training_model
from wakesleep.streams.language_model import load_language_model
from wakesleep.streams.stopping import Stopped

TINY = {"shapes": ("2x6",), "chunk": 6, "tokens": 32, "repeats": 2, "warmup": 1, "peers": ()}
TINY |= {"train_len": 32, "lanes": 2, "positions": (16, 40, 1000), "longest": 40}
TINY |= {"attention_len": 40, "one_shot_len": 64, "prefill_len": 20, "decode_len": 3}


@pytest.fixture
def config(model_folder, shared_text, monkeypatch):
    monkeypatch.setattr(bench_models, "BUNDLED", shared_text)
    threads = torch.get_num_threads()
    yield BenchConfig(model=str(model_folder), dtype="float32", threads=1, **TINY)
    torch.set_num_threads(threads)


def quiet(text):
    pass


def here(function, *arguments, told):
    """Run it in this process, as far as failures go as in another one."""
    try:
        return function(*arguments, told)
    except Unequal as error:
        raise Failed(f"Unequal: {error}") from error


def rows_of(config, operation):
    one = BenchConfig(**{**vars(config), "operations": (operation,)})
    return [row for g in groups(one) for row in bench_work.measure(one, g, here, quiet)]


def other_loop(part):
    """The reference with something changed."""
    loop = bench_layers.memory_loop

    def changed(rule, learned, momentum, tokens):
        if part == "keys":
            tokens = tokens._replace(k=tokens.k.roll(1, 0))
        elif part == "momentum":
            tokens = tokens._replace(eta=tokens.eta * 0.99)
        else:
            rule = rule._replace(chunk=rule.chunk - 1)
        return loop(rule, learned, momentum, tokens)

    return changed


@pytest.mark.parametrize("part", ["keys", "momentum", "chunk"])
@pytest.mark.parametrize("operation", ["memory-streaming", "memory-training"])
def test_a_memory_that_computes_something_else_is_not_timed(config, monkeypatch, operation, part):
    assert faults_of(rows_of(config, operation)) == []
    monkeypatch.setattr(bench_layers, "memory_loop", other_loop(part))
    rows = rows_of(config, operation)
    for row in rows:
        assert row["equal"] is False and "from the reference" in row["check"]
        assert row["tokens_per_second"] is row["peak_bytes"] is row["ratio_to"] is None
        assert "minor_faults" not in row
    assert len(faults_of(rows)) == len(rows)


@pytest.mark.parametrize("operation", ["model-streaming", "decode", "one-shot", "mac-decode"])
def test_a_model_whose_answers_depend_on_the_cut_is_not_timed(config, monkeypatch, operation):
    fill = bench_models.TTLModel.forward

    def forgets(self, tokens, state, *args, **kwargs):
        logits, after, stats = fill(self, tokens, state, *args, **kwargs)
        block = after.blocks[0]
        window = block.window._replace(k=block.window.k * 0.999)
        blocks = (block._replace(window=window), *after.blocks[1:])
        return logits, after._replace(blocks=blocks), stats

    monkeypatch.setattr(bench_models.TTLModel, "forward", forgets)
    rows = rows_of(config, operation)
    mine = [row for row in rows if row["implementation"] != "full attention"]
    assert mine and all(row["equal"] is False and "cut into calls" in row["check"] for row in mine)
    assert all(row["tokens_per_second"] is None for row in mine)
    assert all(row["equal"] for row in rows if row not in mine)


def test_growth_is_dropped_where_the_check_fails(config, monkeypatch):
    monkeypatch.setattr(bench_models, "TOLERANCE", -1.0)
    read, attention = rows_of(config, "growth")[:2], rows_of(config, "growth")[2:]
    assert all(row["equal"] is False and row["tokens_per_second"] is None for row in read)
    assert all(row["equal"] for row in attention)


def test_full_attention_has_to_remember(config, monkeypatch):
    model = bench_attention.FullAttention(load_language_model(config.model).model.config)
    assert "as in one call" in bench_attention.check_attention(model, 0)
    rotate = bench_attention.rotate
    monkeypatch.setattr(bench_attention, "rotate", lambda x, t: rotate(x, t - t[:1] * 0.01))
    with pytest.raises(Unequal, match="from one call"):
        bench_attention.check_attention(model, 0)


class Accumulator:
    """Reads the mean of what came before, as a peer would; its weights move if it is online."""

    def __init__(self, online, learns=True):
        self.online, self.learns, self.dim = online, learns, 3
        self.memory = SimpleNamespace(memory_model_parameters=[torch.zeros(3)])

    def __call__(self, x, carried):
        learned = x.cumsum(1) if self.learns else x
        weights = learned[:, -1] if self.online else torch.zeros(1, 3)
        return learned, SimpleNamespace(weights={"w": weights})


def test_a_peer_whose_weights_stand_still_is_not_timed():
    check = bench_titans.check_online
    assert "weights move" in check(Accumulator(online=True), 4, 0)
    with pytest.raises(Unequal, match="not online"):
        check(Accumulator(online=False), 4, 0)
    with pytest.raises(Unequal, match="does not reach the next"):
        check(Accumulator(online=True, learns=False), 4, 0)


def test_warm_up_rounds_do_not_count_and_all_take_turns():
    calls, rounds = [], []

    def contender(name):
        return Contender(4, lambda: calls.append(name) or torch.ones(1), lambda: "")

    timed = in_turn({n: contender(n) for n in ("a", "b")}, 2, 3, rounds.append)
    assert calls == ["a", "b"] * 5 and rounds[-1] == "turn 5 of 5"
    assert [len(timing.rates) for timing in timed.values()] == [3, 3]
    assert all(rate > 0 for timing in timed.values() for rate in timing.rates)


def test_what_is_not_finite_is_told_and_has_no_speed(config, monkeypatch):
    def build(config, group, entry):
        turns = iter([1.0, float("nan"), 1.0])
        return Contender(4, lambda: torch.tensor(next(turns)), lambda: "all")

    monkeypatch.setattr(bench_work, "build", build)
    monkeypatch.setattr(bench_work, "peak", lambda *_: 10)
    entries = (Entry("ours", "x"), Entry("titans-pytorch", "x"))
    monkeypatch.setattr(bench_work, "skipped", lambda entry: None)
    rows = bench_work.measure(config, Group("decode", "g", entries, entries[1:]), here, quiet)
    assert [row["finite"] for row in rows] == [False, False]
    assert [row["tokens_per_second"] for row in rows] == [None, None]
    assert faults_of(rows) == ["decode, ours, x: not finite"]  # that others end in NaN is a finding


def test_fresh_memory_is_written_to_once():
    touch(1 << 20)
    touch(0)


def test_models_differ_in_their_parts_alone(model_folder):
    given = load_language_model(model_folder)
    layers = {}
    for name, keys in bench_models.WITHOUT.items():
        model = bench_models.without(given, keys).model
        layers[name] = model.config.memory_layers, model.config.store_layers
        assert model.config.dim == given.model.config.dim and model.config.fast_layers == ()
        assert not any(p.requires_grad for p in model.parameters()) or model is given.model
    assert layers == {
        "ours": ((0,), (1,)),
        "no store": ((0,), ()),
        "no memory": ((), (1,)),
        "window only": ((), ()),
    }


def test_a_stream_is_read_with_a_full_store_and_decoding_begins_where_it_says(config):
    reader = bench_models.open_reader(config, "ours")
    state = bench_models._state_at(reader, 1000)
    read = int(reader.runner.state.position)
    assert read >= bench_models.fill_len(reader.language_model.model.config)
    assert 1000 - 16 < int(state.position) <= 1000 and (int(state.position) - read) % 16 == 0
    assert bool((state.blocks[1].store.position >= 0).all())
    near = bench_models._state_at(bench_models.open_reader(config, "ours"), 32)
    assert int(near.position) == 32


def test_a_training_step_of_a_layer_has_a_gradient_for_every_weight(config, monkeypatch):
    made, original = [], bench_layers.our_memory
    monkeypatch.setattr(bench_layers, "our_memory", lambda *a: made.append(original(*a)) or made[0])
    bench_layers.training_layer(config, "2x6", "ours").turn()
    assert all(p.grad is not None and p.grad.any() for p in made[0].parameters())


def test_a_training_step_of_a_model_moves_its_weights_and_carries_its_state(config, monkeypatch):
    from wakesleep.streams.training import StreamModule

    modules, original = [], StreamModule.training_step
    monkeypatch.setattr(
        StreamModule, "training_step", lambda self, *a: modules.append(self) or original(self, *a)
    )
    contender = training_model(config, "ours")
    contender.turn()
    module = modules[0]
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    position = module.state.position.tolist()
    contender.turn()
    moved = {name for name, p in module.model.named_parameters() if not p.equal(before[name])}
    assert moved == {name for name in before if ".store.head." not in name}  # by answers alone
    assert module.state.position.tolist() == [p + 32 for p in position]
    assert bool((module.state.blocks[1].store.position >= 0).all())


@pytest.fixture(scope="module")
def processes():
    return Processes(["torch"])


def _hold(num_bytes, told):
    told("begun")
    return bench_work.peak_of(
        lambda: Contender(1, lambda: torch.ones(num_bytes, dtype=torch.uint8), lambda: "")
    )


def test_a_peak_that_is_read_lower_than_before_is_no_memory(monkeypatch):
    read = iter([4 << 20, (4 << 20) - 81_920])
    monkeypatch.setattr(bench_measure, "peak_rss_bytes", lambda: next(read))
    assert peak_of(lambda: Contender(1, lambda: torch.ones(1), lambda: "")) == 0


def _fail(told):
    raise ValueError("no good\nat all")


def _vanish(told):
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(parent, told):
    """As Ctrl-C, which reaches both processes."""
    os.kill(parent, signal.SIGINT)
    os._exit(130)


def test_memory_is_that_of_a_process_alone_and_its_end_is_told(processes):
    held, told = torch.ones(10**8), []
    peak = processes.run(_hold, 50_000_000, told=told.append)
    assert 49e6 < peak < 150e6 < held.nbytes and told == ["begun"]
    with pytest.raises(Failed, match=r"^ValueError: no good$"):
        processes.run(_fail, told=quiet)
    with pytest.raises(Failed, match="was killed"):
        processes.run(_vanish, told=quiet)
    with pytest.raises(Stopped) as stopped:
        processes.run(_interrupt, os.getpid(), told=quiet)
    assert stopped.value.number == signal.SIGINT
