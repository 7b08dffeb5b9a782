"""What holds for every test: fixed seeds, deterministic kernels, no network, nothing left out."""

import os
import socket
import sys

import pytest
import torch

LEFT_OUT = ("skipped", "xfailed", "xpassed")

if sys.platform != "linux":  # Triton has wheels for Linux alone, so there is nothing to be tested
    collect_ignore_glob = ["kernels/*_triton.py", "scripts/test_gpu_check.py"]


@pytest.fixture(autouse=True)
def _reproducible():
    """Seed torch, refuse kernels without a fixed order and fill `torch.empty` with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Refuse every connection that leaves the machine's own Unix sockets."""

    def guarded(name):
        original = getattr(socket.socket, name)

        def call(self, *args):
            if self.family != socket.AF_UNIX:
                raise RuntimeError(f"a test tried to reach the network: {name}{args}")
            return original(self, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "bind", "sendto"):
            patch.setattr(socket.socket, name, guarded(name))
        yield


def pytest_configure(config):
    """Let the processes of a run share the cores: two torch threads beside another are slower."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # and what tests start


def pytest_sessionfinish(session, exitstatus):
    """Fail a run that left a test out; a run that collected none fails by itself (exit 5)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a process of several: the first one has all reports
        return
    if exitstatus == pytest.ExitCode.OK and any(reporter.stats.get(key) for key in LEFT_OUT):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for key in LEFT_OUT:
        for report in terminalreporter.stats.get(key, []):
            terminalreporter.write_line(f"{report.nodeid}: {key}, and so the run failed")
