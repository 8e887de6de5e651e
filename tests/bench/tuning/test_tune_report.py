"""The tuner's times as a results file: they come back, and give the same rows."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from reports import PROBLEM, TUNING

from kvfold.bench import records
from kvfold.bench.tuning import report, search
from kvfold.bench.tuning.search import TimePoint
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.runtime import dispatch

OP = "paged_kv_compress"


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")


def saved(tmp_path, **changes):
    file = tmp_path / "times.json"
    file.write_text(json.dumps(asdict(TUNING) | changes))
    return file


def test_a_file_is_read_as_the_plan_and_times_that_it_is_of(tmp_path):
    file = tmp_path / "times.json"
    records.save(TUNING, file)
    measured, plan, (times,) = report.read(file)
    assert measured == TUNING
    (family,) = plan.families
    assert family.problem == Problem.of(PROBLEM) and family.shared == (1, 4)
    assert [problem.next_n for problem in family.problems()] == [1, 4]
    assert plan.mixture == {"all-hit": 0.75, "spread": 0.25} and plan.sizes == (1, 16)
    assert [variant.tuning for variant in times] == [
        Tuning(reduce_warps=warps, head_slice=32) for warps in (4, 8)
    ]
    second = list(times.values())[1]
    assert second[TimePoint("state", "spread", 16)] == 1.25 * 16
    assert len(second) == 2 * 2 * 2


def test_a_report_of_a_plan_gives_the_same_choice_when_it_is_read(tmp_path, a_gpu):
    problems = {**PROBLEM, "next_n": [1, 2], "kv_dtype": ["bf16", "fp32"]}
    plan = search.plan(OP, problems, sizes=(1, 64), mixture={"spread": 0.5, "no-hit": 0.5})
    times = [
        {
            variant: {
                point: 10.0 + ((number + n) * point.size) % 7
                for n, point in enumerate(search.all_points(plan))
            }
            for number, variant in enumerate(search.candidates(plan, family.problem, "sm_90")[:5])
        }
        for family in plan.families
    ]
    file = tmp_path / "times.json"
    records.save(report.report(plan, times, torch.device("cpu")), file)
    measured, again, read = report.read(file)
    assert (again, read) == (plan, times)
    assert (measured.device, measured.arch, measured.kind) == ("a stand-in", "sm_90", "tuning")
    first, second = report.choose(plan, times), report.choose(again, read)
    assert first == second
    assert report.buckets(first, "sm_90") == report.buckets(second, "sm_90")


def test_a_merged_field_shares_its_rows():
    """Every value of the shared field gets the ranges of the one that was timed."""
    plan = search.plan(OP, {**PROBLEM, "next_n": [1, 2, 4]}, sizes=(1, 64))
    (family,) = plan.families
    few, many = search.candidates(plan, family.problem, "sm_90")[:2]
    ranges = (search.Range(few, 1, 8), search.Range(many, 9, None))
    buckets = report.buckets([search.Tuned(family, {}, ranges)], "sm_90")
    assert [(b.variant.problem.next_n, b.min_size, b.max_size) for b in buckets] == [
        (next_n, low, high) for next_n in (1, 2, 4) for low, high in ((1, 8), (9, None))
    ]
    assert {b.variant.tuning for b in buckets[::2]} == {few.tuning}
    assert {b.variant.tuning for b in buckets[1::2]} == {many.tuning}
    assert {(b.arch, b.variant.backend) for b in buckets} == {("sm_90", "cuda")}


FAMILY = asdict(TUNING.families[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"op": "none"}, "none is no op"),
        ({"backend": "cpu"}, 'backend = "cpu"'),
        ({"mixture": {"some": 1.0}}, "some is no scenario"),
        ({"prefetch": ["early"]}, "early is no prefetch"),
        ({"families": [FAMILY | {"shared": []}]}, r"shared is \[\]; accepted: values of the sh"),
        ({"families": [FAMILY | {"shared": [4, 1]}]}, r"shared is \[4, 1\]"),
        ({"families": [FAMILY | {"shared": [1, 2]}]}, r"shared is \[1, 2\]"),
        ({"families": [FAMILY | {"problem": PROBLEM | {"head_dim": 100}}]}, "head_dim = 100"),
        (
            {"families": [FAMILY | {"variants": [{"tuning": {"reduce_warps": 3}, "times": []}]}]},
            "head_slice: is missing|reduce_warps = 3|head_slice is missing",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_with_the_files_name(changes, says, tmp_path):
    file = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}.*({says})"):
        report.read(file)


def test_times_of_an_unfinished_run_are_no_choice(tmp_path):
    variants = [asdict(one) for one in TUNING.families[0].variants]
    for one in variants:
        one["times"] = one["times"][:-1]
    file = saved(tmp_path, families=[FAMILY | {"variants": variants}])
    _, plan, times = report.read(file)
    with pytest.raises(ValueError, match="none of the variants was timed at every point"):
        report.choose(plan, times)
    # Of a mixture whose scenarios were all timed, they are one.
    (tuned,) = report.choose(replace(plan, mixture={"all-hit": 1.0}), times)
    assert tuned.ranges
