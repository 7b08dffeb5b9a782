"""The command line: what it loads, prints, refuses, and which exit code it gives."""

import hashlib
import importlib
import json
import lzma
import os
import signal
import subprocess
import sys

import pytest

from wakesleep.streams import allocator, cli, doctor_command, language_model
from wakesleep.streams.allocator import TUNABLES, can_tune
from wakesleep.streams.console import Console, shortened
from wakesleep.streams.errors import Refused
from wakesleep.streams.families import FAMILIES, HELD_OUT_KINDS, TRAINED_KINDS
from wakesleep.streams.stopping import Stopped

CHOSEN = ("GLIBC_TUNABLES", "LD_PRELOAD", "WAKESLEEP_MALLOC")  # of an allocator, by who runs us
HEAVY = "torch lightning numpy omegaconf rich matplotlib safetensors tokenizers".split()
FLAGS = {  # a new flag is a promise: add it here with the one who needs it
    "stream": "--session --config --again --json --quiet --debug --print-config --dry-run",
    "ask": "--json --quiet --debug",
    "sleep": "--config --json --quiet --debug",
    "train": "--output --resume --json --quiet --debug --print-config --dry-run",
    "tune": "--output --workers --json --quiet --debug --print-config --dry-run",
    "bench": "--output --quick --again --json --quiet --debug --print-config",
    "doctor": "--json --quiet --debug",
}


@pytest.fixture(autouse=True)
def _inside_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter."""
    kept = {k: v for k, v in os.environ.items() if k not in CHOSEN}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, **environment},
    )


def refused(capsys, *words: str) -> str:
    """The message of a call that ends with 2: three lines at most, and nothing was made."""
    before = sorted(os.listdir())
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and 1 <= len(err.splitlines()) <= 3
    assert sorted(os.listdir()) == before
    return err


def test_help_and_version_load_the_standard_library_only():
    words = [[], ["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]
    result = python(
        f"import sys; from wakesleep.streams.cli import main\n"
        f"for words in {words}: main(words)\n"
        f"print('LOADED', *(name for name in {HEAVY} if name in sys.modules))"
    )
    assert result.stdout.splitlines()[-1] == "LOADED", result.stderr


def test_the_overview_has_a_line_for_every_command(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, module in cli.COMMANDS.items():
        assert f"  {name:<8}{module.SUMMARY}" in lines
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert lines[2].startswith("  wakesleep stream ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_starts_with_examples_and_fits_a_screen(name, capsys):
    assert cli.main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"wakesleep {name} ") and lines[1] == ""
    assert lines[2].startswith(f"  wakesleep {name}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_is_known_here_and_explained_in_the_help(name):
    assert " ".join(cli.COMMANDS[name].FLAGS) == FLAGS[name]
    assert all(flag in cli.COMMANDS[name].help_text() for flag in FLAGS[name].split())


def test_a_word_that_is_almost_right_is_told_the_right_one(capsys):
    assert "did you mean stream?" in refused(capsys, "strem")
    assert "did you mean --session?" in refused(capsys, "stream", "--sesion", "x")
    assert "is for train" in refused(capsys, "stream", "--resume")
    assert "expected one argument" in refused(capsys, "stream", "--session")


def test_train_needs_a_recipe_that_exists(capsys):
    assert "nothere.yaml: no such file" in refused(
        capsys, "train", "nothere.yaml", "--output", "out"
    )
    assert "needs a recipe" in refused(capsys, "train", "--output", "out")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Refused("what", "where", "way out"), 2, "wakesleep: what\n  where\n  way out\n"),
        (ValueError("a\nb\nc\nd"), 2, "wakesleep: a\n  b\n  c\n"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (RuntimeError("loss is not finite\nat step 3"), 1, "not finite\n  at step 3"),
        (MemoryError(), 1, "MemoryError"),
        (KeyError("bug"), 1, "KeyError: 'bug'\n  --debug shows where."),
        (KeyboardInterrupt(), 130, ""),
        (Stopped(signal.SIGINT), 130, ""),
        (Stopped(signal.SIGTERM), 143, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_how_it_ended_is_the_exit_code_and_at_most_three_lines(
    monkeypatch, capsys, error, code, words
):
    def run(arguments):
        raise error

    monkeypatch.setattr(doctor_command, "run", run)
    assert cli.main(["doctor"]) == code
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message and len(message.splitlines()) <= 3
    assert cli.main(["doctor", "--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code in (1, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_work_begins_ends_all_at_once(number):
    """Even where exceptions are swallowed, as by the imports of torch and numpy."""
    result = python(
        "import os, sys\n"
        "from wakesleep.streams import cli, doctor_command\n"
        "def run(arguments):\n"
        "    print('runs', flush=True)\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    except BaseException:\n"
        "        pass\n"
        "    print('still here')\n"
        "doctor_command.run = run\n"
        "sys.argv = ['wakesleep', 'doctor']\n"
        "cli.main()\n"
    )
    assert (result.stdout, result.returncode) == ("runs\n", 128 + number)


def test_a_signal_ends_a_wait():
    result = python(
        "import os, signal\n"
        "from wakesleep.streams.stopping import Stopped, StopSignals\n"
        "read, write = os.pipe()\n"
        "with StopSignals() as stop:\n"
        "    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "    try:\n"
        "        with stop.waiting():\n"
        "            os.read(read, 1)\n"
        "    except Stopped as stopped:\n"
        "        print(stopped.number)\n"
    )
    assert (result.stdout, result.returncode) == ("15\n", 0)


def test_a_second_signal_stops_at_once():
    result = python(
        "import os, signal\n"
        "from wakesleep.streams.stopping import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    assert not stop\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop and stop.number == signal.SIGINT\n"
        "    print('asked', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    assert (result.stdout, result.returncode) == ("asked\n", 143)


def test_json_is_one_object_on_stdout_and_words_are_on_stderr(capsys):
    code = cli.main(["doctor", "--json"])
    out, err = capsys.readouterr()
    findings = json.loads(out)
    assert findings["versions"]["torch"] in err and code == bool(findings["problems"])
    Console(json=True, quiet=True).result({"a": 1}, "words")
    assert capsys.readouterr() == ('{"a": 1}\n', "")
    odd = {"text": "O\u00f9 \U0001f600 \x9b \u202e"}  # whatever the terminal's encoding
    Console(json=True, quiet=True).result(odd, "words")
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out) == odd
    Console().result({"a": 1}, "words")
    assert capsys.readouterr() == ("words\n", "")


def test_text_of_a_document_cannot_steer_a_terminal():
    assert shortened("a\x1b[31m\r\n\x9b\u202eb [bold]é", 99) == (
        r"a\x1b[31m\r\n\x9b\u202eb [bold]é"
    )
    assert shortened("abcdefgh", 6) == "abc..." and shortened("abcdef", 6) == "abcdef"


def test_a_clashing_torchvision_is_told_apart_from_a_fitting_one(monkeypatch):
    versions = {"torch": "2.13.0", "torchvision": None}
    monkeypatch.setattr(doctor_command, "_version", versions.get)
    assert doctor_command.torchvision_clash() is None
    versions["torchvision"] = "0.28.0"
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert doctor_command.torchvision_clash() is None

    def clash(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", clash)
    message = doctor_command.torchvision_clash()
    assert "0.28.0 does not match torch 2.13.0" in message and "pip uninstall" in message


def test_doctor_loads_the_bundled_model(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_command, "_bundled", lambda name: {"bytes": 1, "sha256": "0"})
    monkeypatch.setattr(doctor_command, "_document_problems", lambda files: [])
    monkeypatch.setattr(language_model, "DEFAULT", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (problem,) = doctor_command.examine()["problems"]
    assert "bundled model is damaged" in problem and "install wakesleep again" in problem


def test_doctor_tells_a_whole_document_from_a_damaged_one(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_command, "_data_folder", lambda: tmp_path)
    packed = lzma.compress(b"text" * 9999)
    sha256 = hashlib.sha256(b"text" * 9999).hexdigest()
    (tmp_path / "document.json").write_text(json.dumps({"sha256": sha256}))
    found = []
    for data in (packed, packed[:-9], lzma.compress(b"test"), b"x"):
        (tmp_path / "document.txt.xz").write_bytes(data)
        problems = doctor_command.examine()["problems"]
        found.append(any("damaged" in problem for problem in problems))
        assert any("default/config.json is missing" in problem for problem in problems)
    assert found == [False, True, True, True]


@pytest.mark.parametrize(
    ("environment", "tuned"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": TUNABLES}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, False),
        ({"LD_PRELOAD": "/usr/lib/libtcmalloc_minimal.so.4"}, False),
        ({"LD_PRELOAD": "/usr/lib/libprofiler.so"}, True),
        ({"WAKESLEEP_MALLOC": "default"}, False),
    ],
)
def test_an_allocator_that_somebody_chose_is_left_alone(monkeypatch, environment, tuned):
    monkeypatch.setattr(allocator, "_has_glibc", lambda: True)
    assert can_tune(environment) is tuned
    monkeypatch.setattr(allocator, "_has_glibc", lambda: False)
    assert can_tune(environment) is False


def test_the_restart_keeps_the_process_and_its_arguments_and_happens_once():
    code = (
        "import os, sys\n"
        "from wakesleep.streams.allocator import restart_with_tuned_malloc\n"
        "print(os.getpid(), sys.argv[0], os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "restart_with_tuned_malloc()\n"
    )
    lines = [line.split() for line in python(code).stdout.splitlines()]
    starts = 2 if can_tune({}) else 1
    assert len(lines) == starts and len({line[0] for line in lines}) == 1
    if starts == 2:
        assert [line[1:] for line in lines] == [["-c", "None"], ["-c", TUNABLES]]
    assert len(python(code, WAKESLEEP_MALLOC="default").stdout.splitlines()) == 1


def test_the_help_of_ask_lists_what_the_shipped_model_was_trained_to_answer():
    text = cli.COMMANDS["ask"].help_text()
    first = {kind: family.questions[0].partition("{")[0] for kind, family in FAMILIES.items()}
    assert all(first[kind] in text for kind in TRAINED_KINDS)
    assert not any(first[kind] in text for kind in HELD_OUT_KINDS)
