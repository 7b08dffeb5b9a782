"""Which form runs: by rule, and said once."""

import logging
import subprocess
import sys

import pytest
import torch

from wakesleep.kernels import dispatch
from wakesleep.kernels.dispatch import delta_rule_form, mlp_scan_form, softmax_read_form

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No setting, nothing said, nothing known about the machine."""
    for name in ("WAKESLEEP_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())  # Triton is installed
    for cached in (dispatch._say, dispatch._machine_obstacle):
        cached.cache_clear()
    yield
    for cached in (dispatch._say, dispatch._machine_obstacle):
        cached.cache_clear()


def ask(dtype=torch.float32, width=64, probabilities=False):
    q, v = torch.empty(1, 2, 4, width + 16, dtype=dtype), torch.empty(1, 2, 4, width, dtype=dtype)
    with torch.no_grad():
        return softmax_read_form(q, q, v, probabilities=probabilities)


def test_a_cpu_uses_pytorch(caplog):
    assert ask() == "torch" and not caplog.records


def test_the_setting_must_be_one_of_three(monkeypatch):
    monkeypatch.setenv("WAKESLEEP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be auto, torch or triton, got 'cuda'"):
        ask()


def test_a_kernel_that_is_forced_on_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("WAKESLEEP_KERNELS", "triton")
    with pytest.raises(ValueError, match="tensors are on cpu, and TRITON_INTERPRET is not 1"):
        ask()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "tensors are torch.float64"),
        ({"dtype": torch.bfloat16}, "bit patterns"),
        ({"width": 48}, "heads are 48 wide"),
        ({"width": 256}, "heads are 256 wide"),
        ({"width": 8}, "heads are 8 wide"),
    ],
)
def test_what_a_forced_kernel_cannot_take_is_refused(options, reason, monkeypatch):
    monkeypatch.setenv("WAKESLEEP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ask() == "triton"
    with pytest.raises(ValueError, match=reason):
        ask(**options)


def test_what_a_kernel_does_not_compute_is_done_by_pytorch_and_said_once(monkeypatch, caplog):
    monkeypatch.setenv("WAKESLEEP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, v = torch.empty(1, 2, 4, 80), torch.empty(1, 2, 4, 64)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert softmax_read_form(q, q, v, probabilities=False) == "torch"
            assert ask(probabilities=True) == "torch"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "no backward pass" in said[0] and "probabilities" in said[1]


def test_the_delta_rule_has_limits_of_its_own(monkeypatch, caplog):
    def ask(gated=False, dtype=torch.float32, C=64, K=64):
        state, k = torch.empty(2, K, K, dtype=dtype), torch.empty(1, 2, C, K)
        with torch.no_grad():
            return delta_rule_form(state, k, k, gated=gated)

    monkeypatch.setenv("WAKESLEEP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ask() == "triton" and ask(C=1, K=16) == "triton"
    assert ask(gated=True) == "torch" and "surprise" in caplog.text
    wrong = {"state is torch.float16": {"dtype": torch.float16}, "chunks have 65": {"C": 65},
             "heads are 128 wide": {"K": 128}}  # fmt: skip
    for reason, options in wrong.items():
        with pytest.raises(ValueError, match=reason):
            ask(**options)


def test_an_mlp_memory_has_limits_of_its_own(monkeypatch, caplog):
    def ask(gated=False, dtype=torch.float32, C=64, K=64, h=128):
        stack, k = torch.empty(2, 2 * K, h, dtype=dtype), torch.empty(1, 2, C, K)
        with torch.no_grad():
            return mlp_scan_form(stack, k, k, k[:, :, -1:], gated=gated)

    assert ask() == "torch" and not caplog.records  # on a CPU
    monkeypatch.setenv("WAKESLEEP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ask() == "triton" and ask(C=1, K=16, h=48) == "triton"
    assert ask(gated=True) == "torch" and "surprise" in caplog.text
    k = torch.empty(1, 2, 4, 16)
    assert mlp_scan_form(k[0], k, k, gated=False) == "triton"  # gradients, too
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert mlp_scan_form(k[0], k, k, gated=False) == "torch" and "compiled" in caplog.text
    wrong = {"weights are torch.float64": {"dtype": torch.float64}, "chunks have 65": {"C": 65},
             "heads are 128 wide": {"K": 128}, "hidden width is 24": {"h": 24}}  # fmt: skip
    for reason, options in wrong.items():
        with pytest.raises(ValueError, match=reason):
            ask(**options)


def test_autocast_and_mixed_dtypes_are_obstacles():
    half, single = torch.empty(1, dtype=torch.float16), torch.empty(1)
    assert "different dtypes" in dispatch._dtype_obstacle(half, single)
    assert dispatch._dtype_obstacle(single, single) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch._dtype_obstacle(single) == "autocast is on"


@pytest.mark.parametrize(
    ("capability", "cuda", "reason"),
    [((7, 5), "12.8", "compute capability 7.5"), ((9, 0), None, "not NVIDIA's")],
)
def test_a_gpu_that_lacks_what_a_kernel_needs_uses_pytorch_and_says_so(
    capability, cuda, reason, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with caplog.at_level(logging.WARNING):
        assert dispatch._choose("softmax_read", GPU, None, None) == "torch"
    assert reason in caplog.text


def test_a_gpu_that_can_uses_the_kernel_unless_told_not_to(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert dispatch._choose("softmax_read", GPU, None, None) == "triton"
    assert dispatch._choose("softmax_read", GPU, None, "too wide") == "torch"
    assert "too wide" in caplog.text
    monkeypatch.setenv("WAKESLEEP_KERNELS", "torch")
    assert dispatch._choose("softmax_read", GPU, None, None) == "torch"


def test_without_triton_pytorch_is_used(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert dispatch._choose("softmax_read", GPU, None, None) == "torch"
    assert "triton is not installed" in caplog.text


def test_choosing_pytorch_imports_no_triton():
    code = """
        import sys, torch
        from wakesleep.kernels.dispatch import softmax_read_form
        q, v = torch.empty(1, 2, 4, 80), torch.empty(1, 2, 4, 64)
        softmax_read_form(q, q, v, probabilities=False)
        assert "triton" not in sys.modules
    """
    lines = [line.strip() for line in code.strip().splitlines()]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
