"""kvfold bench: the check without a GPU, what is measured with one, and what is shown."""

import json
import re

import pytest
import torch
from command_line import kvfold_command, refused

from kvfold.bench import records
from kvfold.bench.cli import bench as command
from kvfold.bench.cli import common
from kvfold.bench.measure import runner
from kvfold.bench.measure.verify import WrongResult
from kvfold.bench.records import KernelReport
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime.compiler import CompileError

OP = "paged_kv_compress"
QUICK = ("bench", OP, "head_dim=64", "--batch", "1,3,64")


# ---- without a GPU -------------------------------------------------------------------------------


def test_bench_without_a_gpu_says_so_and_checks(no_gpu):
    words = ("compress_ratio=4", "page_size=4,7", "--scenario", "all-hit,spread,no-hit")
    text = kvfold_command(*QUICK, *words).stdout
    assert "No CUDA GPU is here" in text and "Right at 18 points" in text
    assert "Where batch is above 16, 16 is checked." in text
    assert f"{OP}: head_dim 64, compress_ratio 4, overlap true" in text
    assert text.count("page_size 4") == text.count("page_size 7") == 1
    rows = re.findall(
        r"^  (\S+), batch (\d+): (\d+) rows? written, largest error \S+e[-+]\d\d$", text, re.M
    )
    scenarios = ("all-hit", "spread", "no-hit")
    assert [row[:2] for row in rows] == 2 * [(s, n) for s in scenarios for n in ("1", "3", "16")]
    assert [row[2] for row in rows] == 2 * ["1", "3", "16", "1", "3", "16", "0", "0", "0"]
    assert not re.search(r"\bus\b", text)


def test_bench_checks_every_problem_that_it_is_given(no_gpu):
    text = kvfold_command("bench", OP, "head_dim=8", "next_n=1,2", "--batch", 1).stdout
    points = 2 * len(WORKLOAD.scenarios)
    assert text.count(f"{OP}: head_dim 8") == 2 and f"Right at {points} points" in text
    once = kvfold_command("bench", OP, "head_dim=8", "--batch", 1, "--scenario", "no-hit").stdout
    assert "Right at 1 point:" in once


def test_bench_fails_when_the_op_is_wrong(no_gpu, monkeypatch):
    monkeypatch.setattr(runner, "torch_op", lambda name: lambda *args, **kwargs: None)
    assert "the op is wrong at all-hit, size 1, head_dim 64" in refused(*QUICK, code=1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--json", "times.json"), "No CUDA GPU is here, so nothing is timed: --json"),
        (("--plot", "times.png"), "No CUDA GPU is here, so nothing is timed: --plot"),
        (("--json", "nowhere/times.json"), "nowhere is no directory"),
        (("--plot", "nowhere/times.png"), "nowhere is no directory"),
        (("--plot", "times.xyz"), "suffix"),
        (("--batch", "1,x"), "accepted: integers"),
        (("--batch", ""), "accepted: integers"),
        (("--batch", "0"), "batch = 0"),
        (("--batch", "999999999"), "batch = 999999999 is not accepted; legal: 1 to 1048576"),
        (("page_size=1000000000",), "page_size = 1000000000 is not accepted; legal: 1 to 4096"),
        (("page_size=0",), "page_size = 0"),
        (("--scenario", "some"), "legal: all-hit, spread, no-hit"),
        (("--prefetch", "early"), "legal: none, metadata, state"),
        (("layout=woven",), "legal: split, packed"),
        (("head_dims=64",), "head_dims is no problem field or case field of paged_kv_compress"),
        (("--override", "reduce_warps"), "not of the form FIELD=VALUE"),
        (("--override", "warps=1"), "legal: backend, reduce_warps, head_slice, "),
        (("--override", "reduce_warps=3"), "reduce_warps = 3"),
        (("--override", "reduce_warps=1,2"), "reduce_warps has 2 values; accepted: one"),
        (("--override", "backend=cpu"), "legal: cuda, triton"),
        (("--suite",), "--suite measures what the op declares: FIELD=VALUE is not accepted"),
        (("--from", "none.json"), "measures nothing: FIELD=VALUE is not accepted"),
    ],
)
def test_bench_refuses_in_one_line(no_gpu, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused("bench", OP, "head_dim=64", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [("--batch", "1"), ("--scenario", "spread"), ("--override", "min_ctas=1"), ("--baseline",)],
)
def test_a_suite_and_a_file_leave_nothing_to_select(words, no_gpu):
    assert f"{words[0]} is not accepted" in refused("bench", OP, "--suite", *words)
    assert f"{words[0]} is not accepted" in refused("bench", OP, "--from", "none.json", *words)


@pytest.mark.parametrize("words", [("--json", "times.json"), ("--suite",), ("--prefetch", "none")])
def test_a_file_leaves_nothing_to_measure(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("bench", OP, "--from", "none.json", *words)
    assert f"--from measures nothing: {words[0]} is not accepted" in line


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (WrongResult("wrong"), 1, "wrong"),
        (CompileError("NVRTC's log"), 1, "NVRTC's log"),
        (ValueError("bad"), 2, "bad"),
        (OSError("gone"), 2, "gone"),
        (FileNotFoundError(2, "no such file", "x.json"), 2, "x.json: no such file"),
        (MemoryError("Unable to allocate 8 TiB"), 1, "not enough memory: Unable to allocate 8 TiB"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 2"),
            1,
            "not enough memory: Tried to allocate 9 GiB. GPU 0 has 2",
        ),
        (
            RuntimeError("[enforce fail at alloc.cpp:1] can't allocate memory: you tried to"
                         " allocate 7 bytes."),
            1,
            "not enough memory: tried to allocate 7 bytes.",
        ),
    ],
)  # fmt: skip
def test_errors_while_measuring_are_one_line(no_gpu, monkeypatch, error, code, says):
    def check(points, device):
        raise error

    monkeypatch.setattr(runner, "check", check)
    assert refused(*QUICK, code=code) == f"kvfold: {says}"


def test_an_error_that_no_user_can_cause_is_not_hidden(no_gpu, monkeypatch):
    def check(points, device):
        raise RuntimeError("a bug")

    monkeypatch.setattr(runner, "check", check)
    with pytest.raises(RuntimeError, match="a bug"):
        kvfold_command(*QUICK)


# ---- with a GPU ----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The plans that the command hands to the runner; nothing is measured or shown."""
    plans: list[list[runner.Plan]] = []

    def measure(given, device, started):
        plans.append(list(given))
        started(given[0].points[0])
        return "report"

    monkeypatch.setattr(common, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(runner, "measure", measure)
    monkeypatch.setattr(command, "_show", lambda report, plot: None)
    monkeypatch.setattr(records, "save", lambda report, file: plans.append([report, file]))
    return plans


def test_bench_hands_its_words_to_the_runner(asked, tmp_path):
    file = tmp_path / "a.json"
    kvfold_command("bench", OP, "page_size=16,32", "--baseline", "--json", file)
    (plan,), saved = asked
    assert saved == ["report", file]
    assert plan.baseline and plan.override == {} and plan.prefetch == tuple(WORKLOAD.prefetch)
    sizes = dict.fromkeys(point.size for point in plan.points)
    assert tuple(sizes) == WORKLOAD.sizes
    assert len(plan.points) == 2 * len(WORKLOAD.scenarios) * len(WORKLOAD.sizes)
    assert {point.options.values()["page_size"] for point in plan.points} == {16, 32}
    assert {point.problem.values()["head_dim"] for point in plan.points} == {512}


def test_an_override_and_a_prefetch_reach_the_runner(asked):
    words = ("--override", "backend=triton", "--override", "head_slice=32", "--prefetch", "none")
    kvfold_command("bench", OP, "overlap=false", "compress_ratio=4", "--batch", "7", *words)
    ((plan,),) = asked
    assert plan.override == {"backend": "triton", "head_slice": 32}
    assert plan.prefetch == ("none",) and not plan.baseline
    assert {(one.size, one.problem.values()["overlap"]) for one in plan.points} == {(7, False)}


def test_a_suite_is_what_the_workload_declares(asked):
    kvfold_command("bench", OP, "--suite", "--prefetch", "state")
    (plans,) = asked
    assert plans == [runner.plan(WORKLOAD, one, ("state",)) for one in WORKLOAD.suite]


# ---- what is shown -------------------------------------------------------------------------------


@pytest.fixture
def report(fake_gpu) -> KernelReport:
    fake_gpu.us["row_by_row"] = 50.0
    measurement = runner.Measurement(
        problem={"head_dim": 128}, sizes=(16,), scenarios=("all-hit",), baseline=True,
        override={"reduce_warps": 1},
    )  # fmt: skip
    plan = runner.plan(WORKLOAD, measurement)
    return runner.measure([plan], torch.device("cpu"), lambda point: None)


def test_bench_shows_and_plots_a_results_file_without_a_gpu(no_gpu, report, tmp_path):
    file, picture = tmp_path / "times.json", tmp_path / "times.png"
    records.save(report, file)
    text = kvfold_command("bench", OP, "--from", file, "--plot", picture).stdout
    assert f"a stand-in, {report.date}: reads 4000 GB/s, copies 3500 GB/s" in text
    assert f"{OP}, all-hit: head_dim 128, compress_ratio 128, overlap false" in text
    tuning, limit = re.escape(report.rows[0].tuning), f"{report.rows[0].limit_us:.2f}"
    first = (
        rf"^ *16 +{tuning} +table +none +10.00 +9.00 +12.00 +{limit} +\d+% +\S+ +\d+ +1.00x +5.0 *$"
    )
    assert re.search(first, text, re.MULTILINE)
    between = rf"^ *16 +{tuning} +table +metadata +7.50 +6.75 +9.00 +{limit} .* 0.75x *$"
    assert re.search(between, text, re.MULTILINE)
    early = rf"^ *16 +{tuning} +table +state +5.00 +4.50 +6.00 +{limit} .* 0.50x *$"
    assert re.search(early, text, re.MULTILINE)
    assert re.search(r"^ *16 +w1_\S+ +override +none +10.00 .* 1.00x *$", text, re.MULTILINE)
    assert re.search(r"^ *16 +row_by_row +yardstick +none +50.00 .* 5.00x *$", text, re.MULTILINE)
    assert (
        "host us per eager call, median over 1 point: call 5.0, torch_ops 5.0, unrepeated 5.0,"
        " triton 5.0"
    ) in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_file_of_another_kind_is_refused(report, tmp_path):
    file = tmp_path / "times.json"
    records.save(report, file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"kind": "step"}))
    line = refused("bench", OP, "--from", file)
    assert f'{file} is no kernels results file: kind is "step"; accepted: kernels' in line
