"""The README's first two commands, and that .ci/run takes the second one from there."""

import re
import shlex
import stat
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(
    r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)


def test_the_first_two_blocks_are_one_complete_line_each():
    for block, last in zip(BLOCKS[:2], ("wakesleep stream", "pytest"), strict=True):
        (line,) = block.splitlines()
        steps = [shlex.split(step) for step in line.split("&&")]
        assert steps[0][1:3] == ["-m", "venv"]
        assert "install" in steps[1] and "constraints.txt" in steps[1]
        assert line.endswith(last)


def test_ci_runs_the_second_block_of_the_readme(tmp_path):
    """Run .ci/run's own extraction, so that a change of either file is seen."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    (program,) = re.findall(r"awk '(.*?)' README\.md", script.read_text())
    found = subprocess.run(
        ["awk", program, str(ROOT / "README.md")], capture_output=True, text=True, check=True
    )
    assert found.stdout == BLOCKS[1]


def test_every_relative_link_leads_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name} links to {target}"
