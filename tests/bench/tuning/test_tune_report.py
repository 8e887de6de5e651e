"""The tuner's times as a results file: they come back, and give the same rows."""

from dataclasses import replace

import pytest
import torch
from reports import PROBLEM, TUNING

from kvfold.bench import records
from kvfold.bench.environment import environment
from kvfold.bench.tuning import search
from kvfold.bench.tuning.plan import TimePoint, plan
from kvfold.bench.tuning.report import TuneReport, rows
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning

OP = "paged_kv_compress"


def test_a_file_is_read_as_the_plan_and_times_that_it_is_of(tmp_path):
    file = tmp_path / "times.json"
    records.save(TUNING, file)
    report = records.load(TuneReport, file)
    assert report == TUNING
    (family,) = report.plan.families
    assert family == [Problem.of(PROBLEM | {"next_n": n}) for n in (1, 4)]
    times = report.times_of(family)
    assert times == report.times
    assert [variant.tuning for variant in times] == [
        Tuning(reduce_warps=warps, head_slice=32) for warps in (4, 8)
    ]
    second = list(times.values())[1]
    assert second[TimePoint("state", "spread", 16)] == 1.25 * 16
    assert len(second) == 2 * 2 * 2


def test_a_report_of_a_plan_gives_the_same_choice_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stand-in")
    problem = {**PROBLEM, "next_n": [1, 2], "kv_dtype": ["bf16", "fp32"]}
    asked = plan(OP, problem, sizes=(1, 64), mixture={"spread": 0.5, "no-hit": 0.5})
    times = {
        variant: {
            point: 10.0 + ((number + n) * point.size) % 7 for n, point in enumerate(asked.points)
        }
        for family in asked.families
        for number, variant in enumerate(search.candidates(asked, family[-1], "sm_90")[:5])
    }
    about = environment(torch.device("cpu"))
    report = TuneReport(**about, arch="sm_90", plan=asked, rows=rows(times))
    file = tmp_path / "times.json"
    records.save(report, file)
    again = records.load(TuneReport, file)
    assert again == report and again.times == times
    for family in asked.families:
        own = {one: found for one, found in times.items() if one.problem == family[-1]}
        assert again.times_of(family) == own and len(own) == 5
        first = search.choose(asked, own, "sm_90")
        assert search.choose(again.plan, again.times_of(family), "sm_90") == first


def test_times_of_an_unfinished_run_are_no_choice():
    unfinished = [replace(row, times=row.times[:-1]) for row in TUNING.rows]
    times = replace(TUNING, rows=unfinished).times
    with pytest.raises(ValueError, match="none of the variants was timed at every point"):
        search.choose(TUNING.plan, times, "sm_90")
    # Of a mixture whose scenarios were all timed, they are one.
    assert search.choose(replace(TUNING.plan, mixture={"all-hit": 1.0}), times, "sm_90")
