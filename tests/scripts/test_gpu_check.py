"""The check of the kernels runs through, interpreted here and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def run(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "WAKESLEEP_KERNELS"):
        environment.pop(name, None)
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_interpreted_every_kernel_is_equal_and_no_speed_is_told():
    done = run("--interpret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no speed was measured" in done.stdout and "all equal" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| kernel")]
    assert {line.split(" | ")[0] for line in rows} == {
        "| softmax_read",
        "| delta_rule",
        "| mlp_scan",
    }
    assert all(line.endswith("| - | - |") for line in rows)


def test_a_wrong_kernel_is_seen_and_not_timed(script, capsys):
    check = script("gpu_check")
    size = check.SIZES[True][0]
    wrong, right = torch.ones(2), torch.tensor([1.0, 1.1]).double()
    runs = (lambda: (wrong,),) * 2
    case = check.Case("softmax_read", size, torch.float32, *runs, (right,), 1, 1)
    error = check.largest_error(case)
    assert error > 100
    assert check.row(case, error, check.Peaks(1.0, {})).endswith("| - | - | - |")


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_equal():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
