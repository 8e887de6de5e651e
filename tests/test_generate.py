"""examples/generate.py, on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "generate.py"

pytest.importorskip("transformers")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip


def test_the_models_generate_the_same_tokens(tmp_path):
    done = run(tmp_path, "--prompt", "140", "--new", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    times = [line for line in done.stdout.splitlines() if line.endswith("ms per token")]
    assert [line[:24].strip() for line in times] == ["transformers", "kvfold", "kvfold, drafts"]
    (tokens,) = [line for line in done.stdout.splitlines() if line.startswith("tokens:")]
    assert len(tokens.split()) == 1 + 6
    assert (tmp_path / "build" / "generate.png").stat().st_size > 0


def test_wrong_arguments_are_refused(tmp_path):
    done = run(tmp_path, "--prompt", "0")
    assert done.returncode == 2 and "--prompt 0" in done.stderr and "accepted" in done.stderr
