"""The suite's own promises: what was left out fails the run, and nothing reaches the network."""

import socket
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).with_name("conftest.py")

OUTCOMES = {
    "passed": ("def test_a(): pass", 0),
    "skipped": ("import pytest\ndef test_b(): pytest.skip()", 1),
    "xfailed": ("import pytest\n@pytest.mark.xfail\ndef test_b(): assert False", 1),
    "xpassed": ("import pytest\n@pytest.mark.xfail\ndef test_b(): pass", 1),
    "module_skipped": ("import pytest\npytest.skip(allow_module_level=True)", 1),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_run_that_left_a_test_out_fails(outcome, pytester):
    source, code = OUTCOMES[outcome]
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_first="def test_a(): pass", test_second=source)
    result = pytester.runpytest_inprocess()
    assert result.ret == code
    if code:
        result.stdout.fnmatch_lines(["test_second.py*and so the run failed"])


def test_a_run_of_two_processes_that_left_a_test_out_fails(pytester):
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_first="def test_a(): pass", test_second=OUTCOMES["skipped"][0])
    result = pytester.runpytest_subprocess("--numprocesses=2")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["test_second.py*and so the run failed"])


def test_a_run_that_found_no_test_fails(pytester):
    pytester.makeconftest(CONFTEST.read_text())
    assert pytester.runpytest_inprocess().ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_test_cannot_reach_the_network():
    with socket.socket() as tcp, pytest.raises(RuntimeError, match="reach the network"):
        tcp.connect(("127.0.0.1", 9))
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(RuntimeError):
        udp.sendto(b"", ("127.0.0.1", 9))


def test_local_sockets_still_work():
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        one.sendall(b"here")
        assert other.recv(4) == b"here"
