"""kvfold tune: the whole command with the GPU stood in for, and what it refuses."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from command_line import kvfold_command, refused

from kvfold.bench import environment, records
from kvfold.bench.cli import common, tune
from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.tuning import gpu
from kvfold.bench.tuning.report import TuneReport
from kvfold.bench.tuning.table_file import MARKER
from kvfold.codegen import Variant, load_table
from kvfold.ops import decode_workload
from kvfold.ops.paged_kv_compress import workload
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.runtime import compiler, dispatch
from kvfold.runtime.compiler import Compiled, CompileError

OP = "paged_kv_compress"
TABLE = """\
version: 1
paged_kv_compress:
  # Mine.
  - {head_dim: 64, compress_ratio: 128, kv_dtype: [bf16, fp32], state_dtype: fp32, next_n: [1, 2],
     backend: cuda, reduce_warps: 1, head_slice: 64}
"""
PREFETCH = ["none", "metadata", "state"]
QUICK = ("tune", OP, "head_dim=64", "kv_dtype=bf16,fp32", "next_n=1,2", "--batch", "1,4,8")


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "table.yaml"
    file.write_text(TABLE)
    return file


@pytest.fixture
def fake_tuner(monkeypatch):
    """Stands in for the GPU: nothing is compiled or called, and the times are made up.

    Of 8 warps, 32 columns are best up to batch 4 and 64 columns above; each is twice as fast there
    as all others. 16 columns spill. What is compiled and timed is in the namespace returned.
    """
    seen = SimpleNamespace(compiled=[], timed=[])

    def compile_all(jobs):
        for one, arch in jobs:
            seen.compiled.append(one)
            assert arch == "sm_90"
            spilled = int(one.tuning.head_slice == 16)
            yield Compiled(one.symbol, arch, b"", 200 // one.tuning.min_ctas, spilled, 0.0), True

    class Timer:
        def __init__(self, plan, device, started):
            assert device.type == "cpu"

        def __call__(self, one: Variant, point) -> float:
            seen.timed.append((one, point))
            best = (8, 64 if point.size > 4 else 32)
            us = 10.0 if best == (one.tuning.reduce_warps, one.tuning.head_slice) else 20.0
            return us / 2 if point.prefetch == "state" else us

    monkeypatch.setattr(common, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    monkeypatch.setattr(gpu, "compile_all", compile_all)
    monkeypatch.setattr(gpu, "GpuTimer", Timer)
    monkeypatch.setattr(environment, "commit", lambda: None)
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    monkeypatch.setattr(decode_workload, "REDUCE_WARPS", (4, 8))
    monkeypatch.setattr(decode_workload, "HEAD_SLICES", (16, 32, 64))
    return seen


def served(file, batch: int, backend="cuda", arch="sm_90", **fields) -> Variant:
    defaults = {"head_dim": 64, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
    problem = Problem(**{**defaults, "next_n": 2, **fields})
    found = load_table(file).find(problem, backend, arch, batch)
    assert found is not None
    return found


# ---- measuring -----------------------------------------------------------------------------------


def test_the_command_measures_chooses_and_writes(fake_tuner, table, tmp_path):
    file = tmp_path / "times.json"
    shown = kvfold_command(*QUICK, "--table", table, "--json", file).stdout
    assert "all-hit, prefetch none: head_dim 64" in shown
    assert "no-hit, prefetch state: head_dim 64" in shown
    assert f"wrote {table}: 3 rows" in shown
    # The row written by hand stays, for other GPUs; the new ones serve both dtypes and next_n.
    text = table.read_text()
    assert text.startswith(TABLE + "\n" + MARKER) and '- origin: "a stand-in, 20' in text
    assert (
        "kvfold tune paged_kv_compress head_dim=64 compress_ratio=128 kv_dtype=bf16,fp32"
        " state_dtype=fp32 next_n=1,2 --backend cuda --batch 1,4,8"
        " --prefetch none,metadata,state"
        ' --mixture all-hit=0.45,spread=0.45,no-hit=0.1"'
    ) in " ".join(text.split())
    assert text.count("kv_dtype: [bf16, fp32]") == 3
    for kv_dtype, next_n in itertools.product(("bf16", "fp32"), (1, 2)):
        problem = {"kv_dtype": kv_dtype, "next_n": next_n}
        for batch, width in ((1, 32), (4, 32), (5, 32), (6, 64), (8, 64), (512, 64)):
            found = served(table, batch, **problem)  # 5 is the geometric middle of 4 and 8
            assert (found.tuning.reduce_warps, found.tuning.head_slice) == (8, width)
        assert served(table, 1, arch="sm_80", **problem).tuning.reduce_warps == 1
    # Spilling candidates were compiled and not timed; next_n was timed once, with each prefetch.
    assert any(one.tuning.head_slice == 16 for one in fake_tuner.compiled)
    assert not any(one.tuning.head_slice == 16 for one, _ in fake_tuner.timed)
    assert {one.problem.next_n for one, _ in fake_tuner.timed} == {2}
    assert {point.prefetch for _, point in fake_tuner.timed} == set(PREFETCH)
    report = records.load(TuneReport, file)
    assert (report.device, report.arch, len(report.plan.families)) == ("a stand-in", "sm_90", 2)
    assert report.plan.prefetch == PREFETCH and report.plan.sizes == [1, 4, 8]


def test_what_is_chosen_is_shown_with_its_times(fake_tuner):
    shown = kvfold_command(*QUICK).stdout
    assert re.search(r"^ *w8_s32 +10.00 +10.00 +20.00 *$", shown, re.MULTILINE)
    assert re.search(r"^ *w8_s64 +10.00 +10.00 +5.00 *$", shown, re.MULTILINE)  # with prefetch
    assert "max_batch: 5, reduce_warps: 8, head_slice: 32}" in shown
    assert "min_batch: 6, reduce_warps: 8, head_slice: 64}" in shown


def test_the_table_in_force_takes_the_rows_and_without_one_they_are_shown(
    fake_tuner, table, tmp_path
):
    kvfold_command(*QUICK)
    assert table.read_text() == TABLE
    kvfold_command(*QUICK, KVFOLD_CONFIG=str(table))
    assert MARKER in table.read_text()
    other = tmp_path / "other.yaml"
    kvfold_command(*QUICK, "--table", other, KVFOLD_CONFIG=str(table))
    assert len(load_table(other).variants) == 8


def test_a_second_run_replaces_the_rows_of_the_first(fake_tuner, table):
    kvfold_command(*QUICK, "--table", table)
    once = table.read_text()
    kvfold_command(*QUICK, "--table", table)
    assert table.read_text() == once


def test_triton_is_tuned_without_compiling_ahead_and_without_prefetch(fake_tuner, tmp_path):
    new = tmp_path / "new.yaml"
    kvfold_command(*QUICK, "--backend", "triton", "--table", new)
    assert not fake_tuner.compiled
    assert {point.prefetch for _, point in fake_tuner.timed} == {"none"}
    assert served(new, 8, backend="triton").backend == "triton"
    assert "--backend triton" in new.read_text()


def test_one_prefetch_can_be_asked_for(fake_tuner, table):
    kvfold_command(*QUICK, "--prefetch", "none", "--table", table)
    assert {point.prefetch for _, point in fake_tuner.timed} == {"none"}
    assert "--prefetch none" in " ".join(table.read_text().split())


# ---- from a file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [(), ("--mixture", "no-hit=3,spread=1")])
def test_a_file_of_times_gives_the_same_rows_with_no_gpu(mixture, fake_tuner, table, tmp_path,
                                                         monkeypatch):  # fmt: skip
    file, again = tmp_path / "times.json", tmp_path / "again.yaml"
    again.write_text(TABLE)
    first = kvfold_command(*QUICK, *mixture, "--json", file, "--table", table).stdout
    monkeypatch.setattr(common, "current_gpu", lambda: None)
    second = kvfold_command("tune", OP, "--from", file, "--table", again).stdout
    assert second == first.replace(str(table), str(again))
    assert again.read_text() == table.read_text()
    assert ("--mixture no-hit=3,spread=1" in " ".join(again.read_text().split())) == bool(mixture)


def test_a_file_of_times_can_be_weighed_anew(fake_tuner, table, tmp_path):
    file = tmp_path / "times.json"
    kvfold_command(*QUICK, "--json", file)
    kvfold_command("tune", OP, "--from", file, "--table", table)
    kvfold_command("tune", OP, "--from", file, "--table", table, "--mixture", "no-hit=1")
    text = " ".join(table.read_text().split())
    assert text.count("origin:") == 1 and "--mixture no-hit=1" in text
    kvfold_command(*QUICK, "--mixture", "no-hit=1", "--json", file)
    line = refused("tune", OP, "--from", file, "--mixture", "spread=1")
    assert "none of the variants was timed at every point" in line


def test_a_file_of_another_op_or_kind_is_refused(fake_tuner, tmp_path, monkeypatch):
    file = tmp_path / "times.json"
    kvfold_command(*QUICK, "--json", file)
    monkeypatch.setattr(tune, "workload", lambda op: workload.WORKLOAD)
    assert f"holds times of {OP}; accepted: of other_op" in refused(
        "tune", "other_op", "--from", file
    )
    file.write_text(json.dumps({"device": "a GPU"}))
    assert f"{file} is no tuning results file: kind is null" in refused("tune", OP, "--from", file)


# ---- what is refused -----------------------------------------------------------------------------


def test_a_table_that_cannot_be_written_costs_no_measuring(fake_tuner, table):
    line = refused(*QUICK, "--table", "/nonexistent/x.yaml")
    assert line == "kvfold: /nonexistent/x.yaml cannot be written: /nonexistent is no directory"
    table.chmod(0o444)
    assert refused(*QUICK, "--table", table) == f"kvfold: {table} is read-only"
    assert refused(*QUICK, KVFOLD_CONFIG=str(table)) == f"kvfold: {table} is read-only"
    assert "no regular file" in refused(*QUICK, "--table", table.parent)
    assert not fake_tuner.compiled and not fake_tuner.timed
    assert table.read_text() == TABLE


def test_a_table_that_cannot_take_the_rows_costs_no_measuring(fake_tuner, table):
    own = TABLE.replace("backend: cuda", "backend: cuda, arch: sm_90")
    table.write_text(own)  # written by hand for this very GPU
    line = refused(*QUICK, "--table", table)
    assert line.startswith(f"kvfold: {table}: ") and "row 1 (line 4)" in line
    table.write_text(TABLE.replace("head_slice: 64", "head_slice: 48"))
    assert "head_slice = 48" in refused(*QUICK, "--table", table)
    assert not fake_tuner.compiled and not fake_tuner.timed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "No CUDA GPU is here, so nothing is timed; accepted: --from FILE"),
        (("--mixture", "some=1"), "some is no scenario; legal: all-hit, spread, no-hit"),
        (("--mixture", "spread"), "accepted: weights of scenarios, as in"),
        (("head_dim=100",), "head_dim = 100"),
        (("head_dim=x",), 'head_dim = "x"'),
        (("reduce_warps=4",), "reduce_warps is no problem field of paged_kv_compress"),
        (("--batch", "0"), "batch = 0"),
        (("--backend", "cpu"), "legal: cuda, triton"),
        (("--backend", "triton", "--prefetch", "state"), "no prefetch of triton; legal: none"),
        (("--json", "nowhere/times.json"), "nowhere is no directory"),
        (("--from", "none.json"), "none.json"),
        (("--from", "none.json", "--json", "times.json"), "--json is not accepted"),
        (("--from", "none.json", "--batch", "1"), "--batch is not accepted"),
        (("--from", "none.json", "head_dim=64"), "FIELD=VALUE is not accepted"),
        (("--from", "none.json", "--backend", "cuda"), "--backend is not accepted"),
    ],
)
def test_the_command_refuses_in_one_line(no_gpu, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused("tune", OP, *words)
    assert not list(tmp_path.iterdir())


def test_cuda_without_nvrtc_is_refused(fake_tuner, monkeypatch):
    monkeypatch.setattr(compiler, "unavailable", lambda: "ImportError: no cupy")
    assert "backend is 'cuda', but there is no NVRTC here (ImportError: no cupy)" in refused(*QUICK)
    kvfold_command(*QUICK, "--backend", "triton")


@pytest.mark.parametrize("error", [WrongResult("x is wrong"), CompileError("NVRTC's log")])
def test_errors_while_tuning_are_one_line(fake_tuner, monkeypatch, error):
    def run(*_):
        raise error

    monkeypatch.setattr(gpu, "run", run)
    assert refused(*QUICK, code=1) == f"kvfold: {error}"


def test_help_says_what_is_timed_and_what_is_shared():
    text = " ".join(kvfold_command("tune", "--help", columns=120).stdout.split())
    for words in ("as next_n, are timed once", "with every prefetch", "how much each prefetch",
                  "gain 1 %", "into the tuned section"):  # fmt: skip
        assert words in text
