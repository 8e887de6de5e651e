"""Results files: the schema, a safe write, and a reader that refuses damaged files in one line."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import kvfold_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reports import KERNELS, PROBLEM, STEP, TUNING

from kvfold.bench import records
from kvfold.bench.records import KernelReport, Report
from kvfold.runtime import files

REPORTS = {"kernels": KERNELS, "step": STEP, "tuning": TUNING}
COMMANDS = {
    "kernels": ("bench", "paged_kv_compress"),
    "step": ("step",),
    "tuning": ("tune", "paged_kv_compress"),
}


def content(report: Report) -> dict:
    """The report as JSON has it."""
    return json.loads(json.dumps({"kind": report.KIND, **records.asdict(report)}))


# ---- writing -------------------------------------------------------------------------------------


def test_a_results_file_has_the_documented_fields(tmp_path):
    file = tmp_path / "times.json"
    records.save(KERNELS, file)
    found = json.loads(file.read_text())
    assert list(found) == [
        "kind", "device", "driver", "versions", "date", "commit", "table_fingerprint",
        "read_bandwidth_gbs", "copy_bandwidth_gbs", "empty_node_us", "rows",
    ]  # fmt: skip
    assert list(found["rows"][0]) == [
        "op", "scenario", "size", "problem", "options", "l2", "backend", "variant", "chosen_by",
        "prefetch", "median_us", "min_us", "max_us", "moved_bytes", "limit_us", "efficiency",
        "host_us",
    ]  # fmt: skip
    assert found["kind"] == "kernels" and found["rows"][0]["problem"] == PROBLEM
    assert found["rows"][0]["host_us"] == {"call": 17.1235, "triton": 30.0}  # rounded
    assert found["rows"][1]["host_us"] == {}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_comes_back_from_its_file(kind, tmp_path):
    file, again = tmp_path / "first.json", tmp_path / "second.json"
    report = REPORTS[kind]
    records.save(report, file)
    loaded = records.load(type(report), file)
    records.save(loaded, again)
    assert again.read_bytes() == file.read_bytes()
    assert type(loaded) is type(report) and kind == report.KIND
    if kind != "kernels":  # of which one time is rounded
        assert loaded == report


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "times.json"
    file.write_text("old")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        records.save(KERNELS, file)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("[]", "kind is null; accepted: kernels"),
        ("{}", "kind is null; accepted: kernels"),
        ('{"kind": "step"}', 'kind is "step"; accepted: kernels'),
        ('{"kind": "kernels"}', r"it is \[\]; accepted: the names device, driver, versions"),
        ("[" * 100_000, "recursion|nest"),
        ("\xff", "codec|decode|Expecting"),
    ],
)
def test_what_is_no_results_file_is_refused_by_name(tmp_path, text, says):
    file = tmp_path / "other.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"other\.json is no kernels results file: .*({says})"):
        records.load(KernelReport, file)


@pytest.mark.parametrize(
    ("kind", "path", "value", "says"),
    [
        ("kernels", ["rows"], [], r"rows is \[\]; accepted: a list of one value or more"),
        ("kernels", ["rows"], None, "rows is null; accepted: a list"),
        ("kernels", ["rows", 1], 5, r"rows\[1\] is 5; accepted: an object"),
        ("kernels", ["rows", 0, "median_us"], None, r"rows\[0\]\.median_us is null; accepted: fl"),
        ("kernels", ["rows", 0, "median_us"], 0, r"rows\[0\]\.median_us is 0; accepted: a pos"),
        ("kernels", ["rows", 0, "limit_us"], math.nan, "limit_us is NaN; accepted: a positive"),
        ("kernels", ["rows", 0, "min_us"], -1.0, "min_us is -1.0; accepted: a positive number"),
        ("kernels", ["rows", 0, "max_us"], "5", 'max_us is "5"; accepted: float'),
        ("kernels", ["rows", 0, "size"], 0, r"rows\[0\]: size = 0"),
        ("kernels", ["rows", 0, "size"], True, r"rows\[0\]\.size is true; accepted: int"),
        ("kernels", ["rows", 0, "moved_bytes"], 10**400, "moved_bytes is .*; accepted: an int of"),
        ("kernels", ["rows", 0, "op"], "none", r"rows\[0\]: none is no op"),
        ("kernels", ["rows", 0, "problem", "head_dim"], 100, r"rows\[0\]: head_dim = 100"),
        ("kernels", ["rows", 0, "options", "page_size"], 0, r"rows\[0\]: page_size = 0"),
        ("kernels", ["rows", 0, "chosen_by"], "hand", r'rows\[0\]: chosen_by = "hand"'),
        ("kernels", ["rows", 0, "l2"], "hot", r'rows\[0\]: l2 = "hot"'),
        ("kernels", ["rows", 0, "host_us", "call"], "x", r'host_us\.call is "x"; accepted: float'),
        ("kernels", ["device"], "\ud800", r"device is .*ud800.*; accepted: printable text"),
        ("kernels", ["versions", "a\nb"], None, r"versions is .*; accepted: printable text"),
        ("kernels", ["driver"], 5, "driver is 5; accepted: str or null"),
        ("kernels", ["versions", "cupy"], 5, r"versions\.cupy is 5; accepted: str or null"),
        ("step", ["rows"], [], r"rows is \[\]; accepted: a list of one"),
        ("step", ["rows", 0, "batch"], 0, r"rows\[0\]: batch = 0"),
        ("step", ["rows", 0, "copy_us"], "x", 'copy_us is "x"; accepted: float or null'),
        ("tuning", ["plan", "sizes"], [], r"plan\.sizes is \[\]; accepted: a list of one"),
        ("tuning", ["plan", "sizes"], [16, 1], "plan: .*sizes are not ascending"),
        ("tuning", ["plan", "sizes"], [0, 16], "plan: batch = 0"),
        ("tuning", ["plan", "mixture"], {}, "plan: mixture is empty"),
        ("tuning", ["plan", "mixture", "spread"], 0, r"plan\.mixture\.spread is 0; accepted: a p"),
        ("tuning", ["plan", "mixture"], {"some": 1.0}, "plan: some is no scenario"),
        ("tuning", ["plan", "prefetch"], ["early"], "plan: early is no prefetch"),
        ("tuning", ["plan", "op"], "none", "plan: none is no op"),
        ("tuning", ["plan", "backend"], "cpu", 'plan: backend = "cpu"'),
        ("tuning", ["plan", "problem", "head_dim"], [100], "plan: head_dim = 100"),
        ("tuning", ["plan", "problem", "next_n"], [1, "x"], 'plan: next_n = "x"'),
        ("tuning", ["rows", 0, "problem", "head_dim"], 100, "head_dim = 100"),
        ("tuning", ["rows", 0, "tuning", "reduce_warps"], 3, "reduce_warps = 3"),
        ("tuning", ["rows", 0, "tuning"], {"reduce_warps": 4}, "head_slice is missing"),
        ("tuning", ["arch"], "hopper", 'arch = "hopper"'),
    ],
)  # fmt: skip
def test_a_damaged_value_is_named_with_its_place(kind, path, value, says, tmp_path):
    damaged = content(REPORTS[kind])
    place = damaged
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=rf"damaged\.json is no {kind} results file: .*{says}"):
        records.load(type(REPORTS[kind]), file)


def test_a_name_too_many_or_too_few_is_refused(tmp_path):
    file = tmp_path / "damaged.json"
    for damaged in (content(KERNELS) | {"note": "x"}, dict(list(content(KERNELS).items())[:-1])):
        file.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="accepted: the names device, driver, versions"):
            records.load(KernelReport, file)


# Values of every type that JSON has, and some that are legal elsewhere in a file.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", "cuda", "triton", "none", "state", "all-hit", "spread", "table", "yardstick", "cold",
         "sm_90", "any", "bf16", "a\nb", "[/x]", "\ud800", [], {}, [[]], [None], {"": 0}, 0, 1, 16]
    ),
)  # fmt: skip


def places(value, path=()):
    """The path of every value in a JSON document."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def damaged(draw, original: dict) -> dict:
    """A document with one to three values changed, removed, doubled or renamed."""
    document = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(document) if path]))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        how = draw(st.sampled_from(["change", "remove", "add"]))
        if how == "change":
            parent[key] = draw(VALUES)
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, draw(st.one_of(VALUES, st.just(copy.deepcopy(parent[key])))))
        else:
            parent[draw(st.text(max_size=5))] = draw(VALUES)
    return document


@pytest.mark.parametrize("kind", REPORTS)
def test_a_damaged_file_is_one_line_and_never_a_traceback(kind, tmp_path_factory):
    """Changed at random in value, type and structure, a file is shown or refused in one line."""
    file: Path = tmp_path_factory.mktemp("damaged") / "times.json"
    original = content(REPORTS[kind])
    refused = []

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(document=damaged(original))
    def check(document):
        file.write_text(json.dumps(document))
        result = kvfold_command(*COMMANDS[kind], "--from", file, code=None)
        if result.exit_code:
            assert result.exit_code == 2
            line = result.stderr
            assert line.startswith("kvfold: ") and line.count("\n") == 1, line
            refused.append(line)

    check()
    assert len(refused) > 30
    assert any(f"{file} is no {kind} results file: " in line for line in refused)


# ---- rows --------------------------------------------------------------------------------------


def test_a_panel_is_what_the_rows_of_one_grid_share():
    row = KERNELS.rows[0]
    assert row.panel == replace(row, size=512, median_us=3.0, prefetch="state").panel
    for other in ({"scenario": "no-hit"}, {"l2": "warm"}, {"problem": {**PROBLEM, "next_n": 1}},
                  {"options": {**row.options, "page_size": 8}}):  # fmt: skip
        assert row.panel != replace(row, **other).panel
