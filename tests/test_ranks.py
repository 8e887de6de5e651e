"""examples/ranks.py, run by torchrun on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_have_the_bits_of_one(ranks):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*words, "--nproc-per-node", str(ranks), "examples/ranks.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(line.endswith("same bits") for line in lines)
    assert all(f"on {ranks} ranks" in line for line in lines)
