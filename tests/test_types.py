"""A type checker finds kvfold, and its types, from a user's file."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("pyright", reason="pyright is not installed")

RIGHT = """
import kvfold, kvfold.codegen, kvfold.step
from torch import Tensor

def call(x: Tensor, table: kvfold.codegen.Table, pool: kvfold.step.StagingPool) -> str:
    kvfold.paged_kv_compress(
        x, x, x, x, x, x, x, x, x, x, 128, 4, prefetch="state", ape_in_state=False, work="reduce"
    )
    kvfold.check(x, x, x, x, x, x, x, x, x, x, 128, 4, ape_in_state=False, work="reduce")
    return table.select("paged_kv_compress", batch=1).symbol
"""
WRONG = """
import kvfold, kvfold.codegen, kvfold.step
from torch import Tensor

def call(x: Tensor, table: kvfold.codegen.Table):
    kvfold.paged_kv_compress(x, x, x, x, x, x, x, x, x, x, "128", 4)
    kvfold.paged_kv_compress(x, x)
    kvfold.paged_kv_compress(x, x, x, x, x, x, x, x, x, x, 128, 4, prefetch=True)
    kvfold.paged_kv_compress(x, x, x, x, x, x, x, x, x, x, 128, 4, "state")
    table.selekt
    kvfold.step.StepBach
"""


def test_pyright_finds_the_types_of_the_installed_package(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "."],
        cwd=tmp_path,
        env=environment | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    found = [
        (os.path.basename(one["file"]), one["range"]["start"]["line"] + 1, one["rule"])
        for one in report["generalDiagnostics"]
        if one["severity"] == "error"
    ]
    assert found == [
        ("wrong.py", 6, "reportArgumentType"),
        ("wrong.py", 7, "reportCallIssue"),
        ("wrong.py", 8, "reportArgumentType"),
        ("wrong.py", 9, "reportCallIssue"),
        ("wrong.py", 10, "reportAttributeAccessIssue"),
        ("wrong.py", 11, "reportAttributeAccessIssue"),
    ]
