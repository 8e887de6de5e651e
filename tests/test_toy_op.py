"""A new op is a folder and a row of the table: a copy of the package gets one, and no other file
changes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.runtime import compiler

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("codegen", "kernels", "bench", "src")
TABLE = Path("configs.yaml")
TOY = Path("kernels/ops/toy")
ROWS = """\
toy:
  - {columns: [64, 96], backend: [cuda, triton], max_rows: 8, warps: 1}
  - {columns: [64, 96], backend: [cuda, triton], min_rows: 9, warps: 4, vectors: true}

"""
IGNORED = shutil.ignore_patterns("__pycache__", "results")
MARKER = "# ---- Everything below is written by `kvfold tune`."

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason="no CUDA compiler here")


class Copy:
    """A copy of the package with the op toy."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in PARTS:
            shutil.copytree(ROOT / part, root / part, symlinks=True, ignore=IGNORED)
        shutil.copy(ROOT / TABLE, root / TABLE)
        self.originals = contents(root)
        shutil.copytree(ROOT / "tests/toy_op", root / TOY, ignore=IGNORED)
        head, marker, tail = (root / TABLE).read_text().partition(MARKER)
        self.table = head + ROWS + marker + tail
        (root / TABLE).write_text(self.table)

    def run(self, *command: str, **environment: str) -> str:
        """What a new process prints, in which kvfold is the copy; an error fails the test."""
        settings = {
            "PYTHONPATH": str(self.root / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_INTERPRET": "1",
            "COLUMNS": "200",
            "KVFOLD_BACKEND": "",
            "KVFOLD_CONFIG": "",
            "KVFOLD_CACHE_DIR": str(self.root.with_name("cache")),
        }
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.root,
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.check_untouched()
        return done.stdout

    def check_untouched(self) -> None:
        """All other files of the copy are those of the package, to the byte."""
        now = contents(self.root)
        assert {path for path in now if path.is_relative_to(TOY)} == {
            TOY,
            *(TOY / file.name for file in (ROOT / "tests/toy_op").iterdir() if file.suffix),
        }
        others = {path: data for path, data in now.items() if not path.is_relative_to(TOY)}
        assert others.pop(TABLE).decode() == self.table
        assert self.table.replace(ROWS, "") == self.originals[TABLE].decode()
        assert others == {path: data for path, data in self.originals.items() if path != TABLE}


def contents(root: Path) -> dict[Path, bytes | str | None]:
    """Path -> bytes of a file, target of a link, or None for a folder."""
    found: dict[Path, bytes | str | None] = {}
    pending = [root]
    while pending:
        for path in pending.pop().iterdir():
            relative = path.relative_to(root)
            if path.is_symlink():
                found[relative] = os.readlink(path)
            elif path.is_dir():
                found[relative] = None
                pending.append(path)
            else:
                found[relative] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("toy"))


# ---- Python --------------------------------------------------------------------------------------

SELECT = """
import sys
import kvfold
from kvfold.codegen import TableError, load_table, op_specs, render
assert kvfold.__file__.startswith({root!r}), kvfold.__file__
assert "toy" in op_specs()
table = load_table()
def symbol(**fields):
    return table.select("toy", columns=96, **fields).symbol
assert symbol(rows=8) == "toy_c96_w1"
assert symbol(rows=9) == "toy_c96_w4_v"
assert symbol(rows=9, backend="triton") == "toy_c96_w4_v_triton"
for fields, words in (
    ({{"batch": 8}}, "rows is missing; legal: rows to scale"),
    ({{"rows": 8, "columns": 100}}, "add to toy in the table"),
    ({{"rows": 8, "columns": 100}}, "- {{columns: 100, backend: cuda, warps: 1}}"),
    ({{"rows": 8, "head_dim": 100}}, "head_dim is no problem field of toy; legal: columns"),
):
    try:
        table.select("toy", **{{"columns": 64}} | fields)
    except TableError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
rendered = render(table)
assert "ops/toy/params.cuh" in rendered.headers
assert "toy::run<toy_c96_w4_v_config>(params);" in rendered.instantiations
assert "torch" not in sys.modules
"""

COMPILE = """
from kvfold.codegen import load_table
from kvfold.runtime import cubin_cache
table = load_table()
for rows in (8, 9):
    variant = table.select("toy", rows=rows, columns=96)
    code = cubin_cache.compiled(variant, "sm_90")
    assert code.symbol.encode() in code.cubin and code.spill_bytes == 0
    assert cubin_cache.compiled(variant, "sm_90") == code
"""

CALL = """
import torch
import kvfold
from kvfold.codegen import load_table
from kvfold.runtime.torch_op import torch_op
x, y = torch.randn(5, 96), torch.zeros(5, 96)
kvfold.toy(x, y, 3)
assert torch.equal(y, 3 * x)
kvfold.toy(x=x, y=y)
assert torch.equal(y, 2 * x)
torch.ops.kvfold.toy(x, y, 4)
assert torch.equal(y, 4 * x)
assert kvfold.toy.__doc__ == "y = factor * x, row by row."
for bad, words in (
    ((x, y[:4]), "y is of shape [4, 96]; accepted: [rows, columns] = [5, 96]"),
    ((x.double(), y), "x is of torch.float64; accepted: torch.float32"),
    ((x, x), "y is in the memory of x"),
    ((x[:, :7].clone(), y[:, :7].clone()), "x is of columns 7; accepted: 4 to 4096 in steps of 4"),
):
    try:
        kvfold.toy(*bad)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
for rows in (5, 9):
    x, y = torch.randn(rows, 96), torch.zeros(rows, 96)
    variant = load_table().select("toy", rows=rows, columns=96, backend="triton")
    torch_op("toy").run_variant(variant, x, y, 3)
    assert torch.equal(y, 3 * x)
torch.library.opcheck(torch.ops.kvfold.toy.default, (x, y, 3))
"""

CALL_ON_GPU = """
import torch
import kvfold
from kvfold.runtime import dispatch
assert dispatch.backend_for("cuda") == "cuda"
for rows in (5, 9):
    wide = torch.randn(rows, 100, device="cuda")
    x, y = wide[:, :96], torch.zeros(rows, 96, device="cuda")
    for factor in (3, 3, -1, 3):
        kvfold.toy(x, y.zero_(), factor)
        assert torch.equal(y, factor * x)
        torch.ops.kvfold.toy(x, y.zero_(), factor)
        assert torch.equal(y, factor * x)
"""


def test_the_table_selects_and_renders_the_variants_of_a_new_op(toy):
    toy.run("-c", SELECT.format(root=str(toy.root)))


@needs_nvrtc
def test_the_cuda_variants_of_a_new_op_compile(toy):
    toy.run("-c", COMPILE)


def test_a_new_op_is_a_function_and_a_torch_op(toy):
    toy.run("-c", CALL)


@pytest.mark.gpu
@needs_nvrtc
def test_a_new_op_runs_on_the_gpu(toy):
    toy.run("-c", CALL_ON_GPU, TRITON_INTERPRET="0")


@pytest.mark.gpu
@needs_nvrtc
def test_a_new_op_is_timed_on_the_gpu(toy, tmp_path):
    file = tmp_path / "toy.json"
    words = ["--rows", "1024", "--scenario", "double", "--json", str(file)]
    toy.run("-m", "kvfold.bench", "bench", "toy", *words, TRITON_INTERPRET="0")
    rows = json.loads(file.read_text())["rows"]
    assert [(row["op"], row["size"], row["variant"]) for row in rows] == [
        ("toy", 1024, "toy_c64_w4_v")
    ]


# ---- the command line ----------------------------------------------------------------------------


def test_a_new_op_is_benchmarked_from_the_command_line(toy):
    shown = toy.run("-m", "kvfold.bench", "bench", "toy", "--rows", "4", "padding=0,8")
    assert "Right at 4 points" in shown
    for part in ("double", "negate", "padding 8", "columns 64"):
        assert part in shown


def test_the_command_line_explains_a_new_op(toy):
    words = ["toy", "columns=96", "--rows", "9"]
    shown = toy.run("-m", "kvfold.bench", "table", "explain", *words)
    for part in ("toy_c96_w4_v", "toy row 2 (line ", "9 CTAs, one per row", "rows 9+"):
        assert part in shown


def test_the_command_line_explains_the_fields_of_a_new_op(toy):
    shown = toy.run("-m", "kvfold.bench", "table", "fields", "toy")
    for part in ("columns of a row", "warps per row", "min_rows", "max_rows", "rows to scale"):
        assert part in shown
