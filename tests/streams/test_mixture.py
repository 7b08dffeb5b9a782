"""Promises of the training sequences.

The oracle is slow and shares no code with the generator: it decodes a sequence, finds what was said
of an entity with the families' wordings as patterns, and takes the latest.
"""

import json
import random
import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from wakesleep.streams.families import FAMILIES, HELD_OUT_KINDS, TRAINED_KINDS
from wakesleep.streams.loose_families import loose_families
from wakesleep.streams.mixture import SORTS, Mixture, MixtureConfig
from wakesleep.streams.sequences import Page, RecallConfig
from wakesleep.streams.stories import DROPS, MOVES, TAKES
from wakesleep.streams.tokenizer import Tokenizer
from wakesleep.streams.words import load_words, split_of

FILLER = 11  # a token of one sign that no fact holds
LENGTH = 1_024
OTHERS = ("reversed", "babi", "babi_in_text")  # test_reversed_facts.py, test_babi.py
OWN = [sort for sort in SORTS if sort not in OTHERS]
SPECIAL = {1: "<Q>", 2: "<A>", 3: "<S>", 4: "<U>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora of one sign: what is not planted is easily told."""
    path = tmp_path_factory.mktemp("corpus")
    sha256 = Tokenizer.load(files("wakesleep.streams") / "data/default/tokenizer.json").sha256
    for name in ("train", "valid"):
        np.save(path / f"{name}.npy", np.full(20_000, FILLER, np.uint16))
        (path / f"{name}.json").write_text(json.dumps({"tokenizer_sha256": sha256}))
    return path


def mixture(folder, *sorts, seed=0, validation=False, length=LENGTH, **facts):
    shares = {sort: (float(sort in (sorts or OWN)),) for sort in SORTS}
    config = MixtureConfig(
        corpus=str(folder / "train.npy"),
        validation_corpus=str(folder / "valid.npy"),
        facts=RecallConfig(**{"loose_share": 0.0, **facts}),
        **shares,
    )
    return Mixture(config, length, seed, validation=validation)


def sequences(data, count=40):
    return [data.sequence(step, 0, 0) for step in range(count)]


def text_of(data, ids):
    """Decoded text; the filler is gone, special tokens are written out."""
    parts, run = [], []
    for i in [*ids.tolist(), 1]:
        if i in SPECIAL:
            parts += [data.tokenizer.decode(run), SPECIAL[i]]
            run = []
        elif i != FILLER:
            run.append(i)
    return "".join(parts[:-1])


def pattern(wording, entity=r"(?P<e>\S+ \S+)", value=r"(?P<v>[^.?<]+)"):
    """A wording as a pattern."""
    escaped = re.escape(wording).replace(r"\{a\}", "an?")
    return escaped.replace(r"\{e\}", entity, 1).replace(r"\{v\}", value, 1)


def latest(family, entity, text):
    """The latest value that a text says of an entity, None if it says nothing."""
    found = [
        (match.start(), -len(match["v"]), match["v"])  # "is now X" reads as "is X", not "now X"
        for wording in (*family.statements, *family.changes)
        for match in re.finditer(rf"(?<!\w){pattern(wording, re.escape(entity))}", text)
    ]
    return max(found)[-1] if found else None


def asked(question):
    """Every (kind, entity) that a question can be about."""
    return {
        (kind, match["e"])
        for kind in TRAINED_KINDS
        for wording in FAMILIES[kind].questions
        if (match := re.fullmatch(pattern(wording), question))
    }


@pytest.mark.parametrize("sort", ["dense", "recall", "changes"])
def test_every_answer_is_the_latest_value_in_the_text_before_it(folder, sort):
    data = mixture(folder, sort)
    known = unknown = 0
    for row in sequences(data):
        for answer in row.answers:
            before = text_of(data, row.tokens[: answer.start])
            _, _, question = before.removesuffix("<A>").rpartition("<Q> ")
            target = text_of(data, row.tokens[answer.start : answer.stop])
            told = {latest(FAMILIES[kind], entity, before) for kind, entity in asked(question)}
            assert len(told) == 1, question
            value = told.pop()
            assert target == ("<U><S>" if value is None else f" {value}<S>"), question
            known, unknown = known + (value is not None), unknown + (value is None)
    assert known > 100 and unknown > 40


def test_every_answer_of_a_story_is_where_its_sentences_lead(folder):
    data = mixture(folder, "stories")
    carried = 0
    sentence = re.compile(rf"(\w+) ({'|'.join((*MOVES, *TAKES, *DROPS))}) the (\w+)\.")
    for row in sequences(data, 150):
        for answer in row.answers:
            before = text_of(data, row.tokens[: answer.start])
            _, the, name = re.findall(r"<Q> (Where is (the )?([^?]+)\?)<A>", before)[-1]
            where, holder = {}, {}
            for person, verb, what in sentence.findall(before):
                if verb in TAKES:
                    holder[what] = person
                    where[what] = where[person]
                elif verb in DROPS:
                    assert holder.pop(what) == person
                else:
                    moved = [person, *(t for t, who in holder.items() if who == person)]
                    where |= dict.fromkeys(moved, what)
            target = text_of(data, row.tokens[answer.start : answer.stop])
            assert target == (f" {where[name]}<S>" if name in where else "<U><S>")
            carried += bool(the)
    assert carried > 10


def test_ages_are_measured_from_the_answer_back_to_the_value(folder):
    data = mixture(folder)
    far = 0
    for row in sequences(data):
        for answer in row.answers:
            start, stop, age, kind = answer
            if age < 0:
                assert data.kinds[kind] == "unknown" and row.tokens[start] == 4
                continue
            ids = row.tokens[start : stop - 1]
            value = start - age
            assert (row.tokens[value : value + len(ids)] == ids).all()
            begin = max(np.flatnonzero(row.tokens[:value] == i)[-1:].sum() for i in (FILLER, 3))
            sentence = text_of(data, row.tokens[begin : value + len(ids) + 1])
            question = text_of(data, row.tokens[:start]).rpartition("<Q>")[2]
            if data.kinds[kind] not in ("story", "pair", "latest_pair"):
                _, entity = asked(question.strip().removesuffix("<A>")).pop()
                assert entity in sentence.rpartition(". ")[2] or entity in sentence
            far += age > 320
    assert far > 100


def test_pairs_of_random_tokens_are_asked_by_the_name_before_the_value(folder):
    data = mixture(folder, "pairs")
    (verb,) = data.tokenizer.encode(" is")
    names = []
    for row in sequences(data):
        tokens = row.tokens.tolist()
        for start, _stop, age, kind in row.answers:
            name = tokens[len(tokens[:start]) - tokens[:start][::-1].index(1) : start - 1]
            if data.kinds[kind] == "pair":
                value = start - age
                assert tokens[value - len(name) - 1 : value] == [*name, verb]
                names.append(tuple(name))
    assert len(names) > 100 and len(set(names)) > 0.95 * len(names)


def test_reversed_pairs_are_asked_by_the_name_behind_the_value_and_often_by_both_its_parts(folder):
    data = mixture(folder, "pairs_reversed")
    (verb,), (end,) = data.tokenizer.encode(" of"), data.tokenizer.encode(".")
    said, shared = [], 0
    for row in sequences(data):
        tokens = row.tokens.tolist()
        for start, stop, age, kind in row.answers:
            if data.kinds[kind] != "pair":
                continue
            name = tokens[start - tokens[:start][::-1].index(1) : start - 1]
            value = tokens[start : stop - 1]
            statement = tokens[start - age :][: len(value) + len(name) + 2]
            assert statement == [*value, verb, *name, end] and row.value[start - age]
            others = [other for other, _ in said[-8:] if other != name]
            shared += any(other[0] == name[0] or other[-1] == name[-1] for other in others)
            said.append((name, value))
    assert len(said) > 100 and 0.2 < shared / len(said) < 0.7


def test_of_pairs_that_change_the_last_value_counts_and_many_lie_far_apart(folder):
    data = mixture(folder, "pairs_latest")
    (verb,) = data.tokenizer.encode(" is")
    older, apart, asked_of = 0, 0, 0
    for row in sequences(data):
        tokens = row.tokens.tolist()
        for start, stop, age, kind in row.answers:
            assert data.kinds[kind] == "latest_pair"
            name = tokens[start - tokens[:start][::-1].index(1) : start - 1]
            head = [*name, verb]
            said = [
                at + len(head)
                for at in range(start)
                if tokens[at : at + len(head)] == head and row.value[at + len(head)]
            ]
            value = tokens[start : stop - 1]
            assert said[-1] == start - age and tokens[said[-1] :][: len(value)] == value
            assert row.fact[said[-1]] and not row.fact[said[:-1]].any()
            asked_of += 1
            older += len(said) > 1
            apart += len(said) > 1 and age > 320
    assert asked_of > 100 and older > 0.5 * asked_of and apart > 30


def test_no_statement_is_asked_twice_by_the_same_question(folder):
    data = mixture(folder)
    for row in sequences(data):
        asked_of = [
            (text_of(data, row.tokens[: a.start]).rpartition("<Q>")[2], a.start - a.age)
            for a in row.answers
            if a.age >= 0
        ]
        assert len(asked_of) == len(set(asked_of))


@pytest.mark.parametrize("sort", ["dense", "recall", "changes"])
def test_facts_are_the_values_that_still_count(folder, sort):
    data = mixture(folder, sort)
    for row in sequences(data):
        inside = {i for a in row.answers if a.age >= 0 for i in range(a.start, a.stop)}
        expected = np.zeros(LENGTH, bool)
        ages = {i: a.age for a in row.answers for i in range(a.start, a.stop)}
        for i in inside:
            expected[i - ages[i]] = True
        assert (row.fact == expected).all()
        assert row.value[row.fact].all()


def test_values_that_changed_are_values_and_no_facts(folder):
    data = mixture(folder)
    page = Page(data.tokenizer, random.Random(0), 64, RecallConfig())
    page.say(0, "Ann Reed lives in Paris.", "Paris", valid=False)
    page.say(30, "Ann Reed has moved to Rome.", "Rome")
    row = page.finish(data.corpus)
    assert text_of(data, row.tokens[row.value]) == " Paris. Rome."
    assert text_of(data, row.tokens[row.fact]) == " Rome."


@pytest.mark.parametrize("restated", [0.0, 1.0])
def test_changes_may_be_said_like_first_statements(folder, restated):
    data = mixture(folder, "changes", changed_share=1.0, restated=restated)
    text = " ".join(text_of(data, row.tokens) for row in sequences(data))
    assert (" moved to " in text) == (restated == 0.0)


def test_a_value_is_found_behind_an_entity_of_the_same_name(folder):
    data = mixture(folder)
    page = Page(data.tokenizer, random.Random(0), 64, RecallConfig())
    page.say(0, "Ann Paris lives in Paris.", "Paris")
    row = page.finish(data.corpus)
    place, _ = np.flatnonzero(row.fact)  # of the value and of what ends it
    assert text_of(data, row.tokens[:place]).endswith("Ann Paris lives in")


def test_weights_are_those_of_answer_prompt_and_text_and_nothing_else(folder):
    weights = {"answer_weight": 3.0, "language_weight": 0.5, "prompt_weight": 0.25}
    data = mixture(folder, **weights)
    for row in sequences(data):
        answer = np.zeros(LENGTH, bool)
        inside, begun = False, None
        for i, token in enumerate(row.tokens.tolist()):
            answer[i] = inside
            if token == 2:
                inside, begun = True, i + 1
            elif token == 3 and inside:
                assert (begun, i + 1) in [(a.start, a.stop) for a in row.answers]
                inside = False
        assert (answer == (row.weight == 3.0)).all()
        assert ((row.tokens == FILLER) == (row.weight == 0.5)).all()
        assert (row.weight[row.tokens == 1] == 0).all()
        assert set(np.unique(row.weight)) <= {0, 0.25, 0.5, 3.0}


def test_training_holds_no_held_out_family_and_no_word_of_another_split(folder):
    for validation, split in ((False, "train"), (True, "validation")):
        data = mixture(folder, "dense", "changes", validation=validation)
        words = load_words(split)
        seen = set()
        for row in sequences(data, 30):
            text = text_of(data, row.tokens)
            for kind in HELD_OUT_KINDS:
                for wording in (*FAMILIES[kind].statements, *FAMILIES[kind].questions):
                    assert not re.search(pattern(wording), text)
            for question in re.findall(r"<Q> ([^<]+)<A>", text):
                for kind, entity in asked(question):
                    seen |= {(kind, word) for word in entity.split(" ")}
                    told = latest(FAMILIES[kind], entity, text)
                    if FAMILIES[kind].value in ("person", "thing") and told:
                        seen |= {(kind, word) for word in told.split(" ")}
                    elif told:
                        seen.add((kind, told))
        assert {kind for kind, _ in seen} == set(TRAINED_KINDS)
        assert {split_of(word) for _, word in seen} == {split}
        assert {word for _, word in seen} & set(words.last_names)


def test_most_questions_are_out_of_the_window_and_some_about_nothing(folder):
    data = mixture(folder, "recall", length=4_096)
    answers = [answer for row in sequences(data, 100) for answer in row.answers]
    ages = np.array([answer.age for answer in answers if answer.age >= 0])
    assert 0.68 < np.mean(ages > 320) < 0.85
    assert 0.25 < 1 - len(ages) / len(answers) < 0.35


def test_a_batch_depends_on_seed_step_and_lane_alone(folder):
    one, other = mixture(folder), mixture(folder)
    other.batch(0, 2)
    first, again = one.batch(7, 3), other.batch(7, 3)
    assert all((first[name] == again[name]).all() for name in first)
    single = one.sequence(7, 2, 0)
    assert (single.tokens == first["tokens"][2]).all()
    for step, seed in ((8, 0), (7, 1)):
        assert (mixture(folder, seed=seed).batch(step, 3)["tokens"] != first["tokens"]).any()


def test_a_batch_holds_the_answers_of_its_lanes(folder):
    data = mixture(folder, "recall")
    batch = data.batch(3, 4)
    assert batch["tokens"].dtype == np.int64 and batch["weight"].dtype == np.float32
    for lane in range(4):
        row = data.sequence(3, lane, 0)
        own = batch["answer_lane"] == lane
        names = ("answer_start", "answer_stop", "answer_age", "answer_kind")
        got = list(zip(*(batch[name][own].tolist() for name in names), strict=True))
        assert got == row.answers and row.answers
    empty = mixture(folder, "language").batch(0, 2)
    assert len(empty["answer_lane"]) == 0 and (empty["tokens"] == FILLER).all()


def test_stages_begin_at_the_tokens_that_are_named(folder):
    config = MixtureConfig(
        corpus=str(folder / "train.npy"),
        stage_tokens=(8 * LENGTH, 16 * LENGTH),
        dense=(1.0, 0.0, 0.0),
        recall=(0.0,),
        changes=(0.0,),
        stories=(0.0, 1.0, 0.0),
        language=(0.0, 0.0, 1.0),
    )
    data = Mixture(config, LENGTH, 0)
    for step in range(12):
        tokens = data.batch(step, 2)["tokens"]
        text = text_of(data, tokens.ravel())
        assert ("pass code" in text) == (step < 4)
        assert ("Where is" in text) == (step < 8)
        assert (tokens == FILLER).all() == (step >= 8)


def test_facts_become_more_and_farther_from_stage_to_stage(folder):
    shares = {sort: (float(sort == "recall"),) for sort in SORTS}
    config = MixtureConfig(
        corpus=str(folder / "train.npy"),
        stage_tokens=(4 * LENGTH,),
        facts=RecallConfig(loose_share=0.0, unknown_share=0.0, far_share=1.0),
        facts_min=(1, 6),
        facts_max=(2, 6),
        far=(0, 500),
        **shares,
    )
    data = Mixture(config, LENGTH, 0)
    stages = [[data.sequence(step, 0, stage) for step in range(20)] for stage in (0, 1)]
    facts = [{int((np.diff(row.value.astype(int)) == 1).sum()) for row in rows} for rows in stages]
    assert max(facts[0]) <= 3 < 6 <= min(facts[1])
    near, far = (np.median([a.age for row in rows for a in row.answers]) for rows in stages)
    assert near < 500 <= far
    with pytest.raises(ValueError, match="far must be one number or one for each of 2 stages"):
        replace(config, far=(1, 2, 3))
    with pytest.raises(ValueError, match="facts_min must be from 1 to facts_max=6, not 9"):
        replace(config, facts_min=(1, 9))


def test_ordinary_text_runs_through_a_sequence_in_its_own_order(tmp_path, folder):
    ids = np.arange(100, 4_000, dtype=np.uint16)
    np.save(tmp_path / "count.npy", ids)
    (tmp_path / "count.json").write_text((folder / "train.json").read_text())
    config = MixtureConfig(corpus=str(tmp_path / "count.npy"), facts=RecallConfig(facts_min=4))
    for row in sequences(Mixture(config, LENGTH, 0)):
        text = row.tokens[row.weight == np.float32(0.3)]
        assert len(text) < 10 or (np.diff(text) == 1).all()


def test_what_cannot_be_mixed_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"corpus must name a \.npy"):
        Mixture(MixtureConfig(), LENGTH, 0)
    with pytest.raises(
        ValueError, match=r"sequence_len must be below the 20,000 tokens of data\.mixture\.corp"
    ):
        mixture(folder, length=20_000)
    np.save(tmp_path / "other.npy", np.zeros(9_000, np.uint16))
    (tmp_path / "other.json").write_text('{"tokenizer_sha256": "0"}')
    with pytest.raises(ValueError, match="of another tokenizer"):
        Mixture(MixtureConfig(corpus=str(tmp_path / "other.npy")), LENGTH, 0)
    with pytest.raises(ValueError, match="recall must be one share or one for each of the 2"):
        MixtureConfig(stage_tokens=(1e6,), recall=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="in every stage"):
        MixtureConfig(**{sort: (0.0,) for sort in SORTS})
    with pytest.raises(ValueError, match="facts_min must be from 1 to facts_max=24, not 25"):
        RecallConfig(facts_min=25)


def test_hard_places_are_around_facts_and_only_in_training(folder, tmp_path):
    corpus = np.full(20_000, FILLER, np.uint16)
    places = np.arange(1_000, 19_000, 500)
    corpus[places] = FILLER + 1
    np.save(tmp_path / "train.npy", corpus)
    (tmp_path / "train.json").write_text((folder / "train.json").read_text())
    np.save(tmp_path / "hard.npy", places)
    config = MixtureConfig(
        corpus=str(tmp_path / "train.npy"),
        validation_corpus=str(tmp_path / "train.npy"),
        hard=str(tmp_path / "hard.npy"),
        facts=RecallConfig(facts_max=2),
    )

    def marks(sort, validation=False):
        shares = {name: (float(name == sort),) for name in SORTS}
        data = Mixture(replace(config, **shares), LENGTH, 0, validation=validation)
        return np.array([(row.tokens == FILLER + 1).sum() for row in sequences(data)])

    # 6 to 8 excerpts of 128 tokens, or a passage with 2 places in it
    assert 0.3 < np.mean(marks("recall") >= 6) < 0.7
    assert marks("recall", validation=True).max() <= 3 and marks("language").max() <= 3
    np.save(tmp_path / "hard.npy", np.array([20_000]))
    with pytest.raises(ValueError, match=r"not those of data\.mixture\.corpus"):
        Mixture(config, LENGTH, 0)


def test_facts_of_no_family_are_answered_by_what_was_said_last(folder):
    data = mixture(folder, "dense", loose_share=1.0)
    families = loose_families()
    known, unknown, seen = 0, 0, set()
    for row in sequences(data):
        for answer in row.answers:
            before = text_of(data, row.tokens[: answer.start])
            _, _, question = before.removesuffix("<A>").rpartition("<Q> ")
            target = text_of(data, row.tokens[answer.start : answer.stop])
            told = set()
            for family in families:
                for wording in family.questions:
                    match = re.fullmatch(pattern(wording), question)
                    if match:
                        told.add(latest(family, match["e"], before))
                        seen.add(family)
            value = max(told, key=lambda found: found is not None)
            assert target == ("<U><S>" if value is None else f" {value}<S>"), question
            known, unknown = known + (value is not None), unknown + (value is None)
    assert known > 100 and unknown > 40 and len(seen) > 100


def test_facts_of_no_family_share_no_word_with_the_held_out_ones():
    held_out = {
        word
        for kind in HELD_OUT_KINDS
        for wording in (*FAMILIES[kind].statements, *FAMILIES[kind].questions)
        for word in re.findall(r"[a-z]{4,}", wording.lower())
    }
    common = {"what", "which", "that", "there", "does", "must"}
    loose = {
        word
        for family in loose_families()
        for wording in (*family.statements, *family.questions, *family.changes)
        for word in re.findall(r"[a-z]{4,}", wording.lower())
    }
    assert held_out & loose <= common
