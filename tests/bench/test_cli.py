"""The command line: every command, its help, and wrong inputs, as a user meets them."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import kvfold
from kvfold.bench import cli, report
from kvfold.bench.verify import WrongResult
from kvfold.codegen import load_table

SMALL = """\
version: 1
paged_kv_compress:
  - {head_dim: 64, compress_ratio: [4, 128], kv_dtype: bf16, state_dtype: fp32, next_n: 4,
     backend: cuda, reduce_warps: 1, head_slice: 64}
  - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 2,
     backend: cuda, arch: sm_80, max_batch: 8, reduce_warps: 1, head_slice: 64}
  - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 2,
     backend: cuda, arch: sm_80, min_batch: 9, reduce_warps: 4, head_slice: 64}
"""


def kvfold_command(*arguments: str, code: int = 0, columns: int = 200):
    """Runs the command line in this process and checks its exit code; returns the result."""
    environment = {"COLUMNS": str(columns), "TERM": "dumb"}
    apart = "mix_stderr" in inspect.signature(CliRunner).parameters  # as newer ones always do
    runner = CliRunner(mix_stderr=False) if apart else CliRunner()
    result = runner.invoke(cli.app, list(map(str, arguments)), env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str, code: int = 2) -> str:
    """The one line that a wrong input gets."""
    line = kvfold_command(*arguments, code=code).stderr
    assert line.startswith("kvfold: ") and "Traceback" not in line
    return line


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def small(tmp_path, monkeypatch):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    monkeypatch.setenv("KVFOLD_CONFIG", str(file))
    return file


# ---- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ((), ["table", "build", "demo", "bench", "tune"]),
        (("table",), ["list", "check", "explain", "KVFOLD_CONFIG"]),
        (("table", "list"), ["--all", "--json"]),
        (("table", "check"), ["FILE", "exit code 2"]),
        (("table", "explain"), ["--head-dim", "--compress-ratio", "--batch", "--arch"]),
        (("build",), ["--arch", "--out", "--emit", "no GPU"]),
        (("tune",), ["--head-dim", "--batch", "--mixture", "--table", "--dry-run", "--from"]),
        (("demo",), ["--steps", "--seed", "--device"]),
        (("bench",), ["--override", "--baseline", "--warm-l2", "--json", "--plot", "--from"]),
    ],
)
def test_help_says_what_there_is(command, mentions):
    text = kvfold_command(*command, "--help", columns=120).stdout
    assert not [word for word in mentions if word.lower() not in text.lower()]


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("table", "frobnicate"),
        ("bench", "--frobnicate"),
        ("table", "check"),
        ("table", "explain"),
        ("demo", "--steps", "0"),
        ("demo", "--steps", "many"),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    assert "Usage" in kvfold_command(*arguments, code=2).stderr


# ---- table --------------------------------------------------------------------------------------


def test_table_list_shows_every_row_and_how_many_variants_it_makes():
    text = kvfold_command("table", "list").stdout
    table = load_table()
    assert f"{len(table.variants)} variants" in text and table.fingerprint in text
    rows = re.findall(r"^ (\d+) +\S+ .* (\d+) +$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == sorted({b.row for b in table.buckets})
    assert sum(int(count) for _, count in rows) == len(table.buckets)


def test_table_list_all_shows_every_variant():
    text = kvfold_command("table", "list", "--all").stdout
    assert not [v.symbol for v in load_table().variants if v.symbol not in text]


def test_table_list_json_is_the_whole_table(small):
    listed = json.loads(kvfold_command("table", "list", "--json").stdout)
    assert [one["symbol"] for one in listed] == [b.variant.symbol for b in load_table().buckets]
    assert [(one["arch"], one["min_batch"], one["max_batch"]) for one in listed] == [
        ("any", 1, None),
        ("any", 1, None),
        ("sm_80", 1, 8),
        ("sm_80", 9, None),
    ]
    assert {"head_dim", "overlap", "reduce_warps", "threads", "shared_bytes"} < listed[0].keys()


def test_table_check_passes_a_good_table_and_names_what_is_wrong(small):
    assert "OK: 3 rows, 4 variants (4 cuda)" in kvfold_command("table", "check", small).stdout
    small.write_text(SMALL.replace("head_slice: 64", "head_slice: 48"))
    line = refused("table", "check", small)
    assert str(small) in line and "row 1 (line 3)" in line and "head_slice = 48" in line
    small.write_text("version: [")
    assert "line" in refused("table", "check", small)
    assert "cannot be read" in refused("table", "check", small.with_name("none.yaml"))
    assert "cannot be read" in refused("table", "check", small.parent)


def test_a_broken_table_in_force_is_one_line_for_every_command(small):
    small.write_text(SMALL.replace("next_n: 4", "next_m: 4"))
    for command in (("table", "list"), ("table", "explain", "--batch", "1"), ("build",)):
        assert "did you mean next_n?" in refused(*command)


def test_explain_says_which_row_serves_and_who_its_neighbours_are(small):
    words = ("--head-dim", 64, "--next-n", 2, "--arch", "sm_80", "--batch", 8)
    text = kvfold_command("table", "explain", *words).stdout
    assert re.search(r"variant +paged_kv_compress_hd64_r128_bf16_fp32_n2_w1_s64", text)
    assert "row 2 (line 5)" in text and "serves batch sizes 1-8" in text
    assert "8 reducing CTAs = 8 requests x 1 slices of 64 columns; 32 threads each" in text
    assert re.search(r"-> +1-8 .*_w1_s64 .*\n +9\+ .*_w4_s64", text)


def test_explain_says_how_a_persistent_variant_is_launched(small):
    row = "next_n: 4, backend: cuda, schedule: persistent, reduce_warps: 4, head_slice: 64"
    small.write_text(
        "version: 1\npaged_kv_compress:\n  - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16,"
        f" state_dtype: fp32, {row}, min_ctas: 3}}\n"
    )
    text = kvfold_command("table", "explain", "--head-dim", 64, "--batch", 8).stdout
    assert "at most 3 CTAs per SM share 8 requests x 1 slices of 64 columns; 128 threads" in text


def test_explain_falls_back_to_any_and_gives_the_row_to_add_where_there_is_none(small):
    text = kvfold_command("table", "explain", "--head-dim", 64, "--arch", "sm_90", "--batch", 1)
    assert "arch any" in text.stdout
    line = refused("table", "explain", "--head-dim", 64, "--next-n", 3, "--batch", 1)
    assert "- {head_dim: 64, compress_ratio: 128" in line
    assert "legal: bf16, fp32" in refused("table", "explain", "--batch", 1, "--kv-dtype", "fp16")
    assert "batch = 0" in refused("table", "explain", "--batch", 0)


# ---- build --------------------------------------------------------------------------------------


def test_build_compiles_what_the_arch_may_run_and_writes_it(small, tmp_path):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="no NVRTC")
    out = tmp_path / "out"
    words = ("--arch", "sm_90", "--arch", "sm_80", "--out", out, "--emit")
    text = kvfold_command("build", *words).stdout
    assert "6 variants compiled for sm_90, sm_80; 0 spill" in text
    assert len(re.findall(r"_s64 +sm_90 +\d+ +0 +\d+ +\d+\.\d\d", text)) == 2
    assert len(list(out.glob("*.sm_80.cubin"))) == 4 and len(list(out.glob("*.sm_90.cubin"))) == 2
    assert all(file.read_bytes().startswith(b"\x7fELF") for file in out.glob("*.cubin"))
    fingerprint = load_table().fingerprint
    assert fingerprint in (out / "instantiations.cu").read_text()
    assert fingerprint in (out / "dispatch.py").read_text()


def test_build_refuses_what_it_cannot_do(small, tmp_path, monkeypatch):
    assert "arch" in refused("build", "--arch", "hopper")
    assert "arch any" in refused("build", "--arch", "any")
    assert "--out" in refused("build", "--emit")
    small.with_name("file").write_text("")
    assert "file" in refused("build", "--out", small.with_name("file"))
    monkeypatch.setattr(cli.nvrtc, "available", lambda: "ImportError: no cupy")
    assert "no NVRTC here (ImportError: no cupy)" in refused("build", code=1)


# ---- demo ---------------------------------------------------------------------------------------


def test_demo_prints_a_summary(no_gpu):
    text = kvfold_command("demo", "--steps", 3).stdout
    for name in ["device", "backend", "variants", "steps", "rows", "largest", "time"]:
        assert re.search(rf"^{name}", text, re.MULTILINE)
    assert "all right" in text


def test_demo_fails_when_a_row_is_wrong(no_gpu, monkeypatch):
    monkeypatch.setattr(kvfold, "paged_kv_compress", lambda *args: None)
    line = refused("demo", "--steps", 3, code=1)
    assert re.search(r"\d+ rows are wrong, the first at step 0", line)


def test_demo_refuses_a_device_that_is_not_there(no_gpu):
    assert "accepted: cpu" in refused("demo", "--device", "cuda")
    assert "accepted: cpu, cuda" in refused("demo", "--device", "tpu")


# ---- bench --------------------------------------------------------------------------------------

QUICK = ("bench", "--head-dim", 64, "--batch", "1,3,64")


def test_bench_without_a_gpu_says_so_and_checks(no_gpu):
    text = kvfold_command(*QUICK, "--compress-ratio", 4, "--page-size", "4,7").stdout
    assert "No CUDA GPU" in text and "Right at 12 points" in text
    assert not re.search(r"\bus\b", text)


def test_bench_fails_when_the_op_is_wrong(no_gpu, monkeypatch):
    monkeypatch.setattr(kvfold, "paged_kv_compress", lambda *args: None)
    assert "the op is wrong at all-hit, batch 1" in refused(*QUICK, code=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--json", "times.json"), "no CUDA GPU"),
        (("--plot", "times.png"), "no CUDA GPU"),
        (("--json", "nowhere/times.json"), "no directory"),
        (("--plot", "times.xyz"), "suffix"),
        (("--batch", "1,x"), "accepted: integers"),
        (("--batch", ""), "accepted: integers"),
        (("--batch", "0"), "batch = 0"),
        (("--scenario", "some"), "legal: all-hit, spread, no-hit"),
        (("--layout", "woven"), "legal: split, packed"),
        (("--override", "reduce_warps"), "NAME=VALUE"),
        (("--override", "warps=1"), "legal: backend, schedule, reduce_warps, head_slice"),
        (("--from", "none.json"), "none.json"),
        (("--from", "none.json", "--json", "times.json"), "measures nothing"),
    ],
)
def test_bench_refuses_in_one_line(no_gpu, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(*QUICK, *arguments)
    assert not list(tmp_path.iterdir())


def test_bench_shows_and_plots_a_results_file_without_a_gpu(no_gpu, tmp_path):
    problem = {"head_dim": 64, "overlap": False, "next_n": 4}
    row = {
        "op": "paged_kv_compress",
        "scenario": "all-hit",
        "problem": problem,
        "batch": 16,
        "page_size": 32,
        "layout": "split",
        "l2": "cold",
        "backend": "cuda",
        "variant": "paged_kv_compress_hd64_n4_w8_s64",
        "prefetch_state": False,
        "median_us": 5.0,
        "min_us": 4.5,
        "max_us": 6.0,
        "bytes": 10_000_000,
        "limit_us": 2.5,
        "efficiency": 0.5,
        "host_us": 17.0,
    }
    row |= {"host_torch_ops_us": 20.0, "host_triton_us": 30.0}
    override = row | {
        "variant": "paged_kv_compress_hd64_n4_w1_s64",
        "median_us": 50.0,
        "max_us": 60.0,
        "host_us": None,
        "host_torch_ops_us": None,
        "host_triton_us": None,
    }
    results = {
        "device": "a GPU",
        "driver": None,
        "versions": {},
        "date": "2026-11-21T09:00:00+00:00",
        "commit": None,
        "config_fingerprint": "0123456789abcdef",
        "read_bandwidth_gbs": 4700.0,
        "copy_bandwidth_gbs": 4260.0,
        "empty_node_us": 0.52,
        "rows": [row, override],
    }
    file, picture = tmp_path / "times.json", tmp_path / "times.png"
    file.write_text(json.dumps(results))
    text = kvfold_command("bench", "--from", file, "--plot", picture).stdout
    assert "a GPU, 2026-11-21T09:00:00+00:00: reads 4700 GB/s" in text
    assert re.search(r"16 +w8_s64 +table +5.00 +4.50 +6.00 +2.50 +50% +10.00 +2000 +17.0", text)
    assert re.search(r"16 +w1_s64 +override +50.00 .* 10.00x", text)
    assert "17.0 by kvfold, 20.0 by torch.ops.kvfold, 30.0 by Triton's launcher" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_hands_its_options_to_the_runner(monkeypatch, tmp_path):
    plans, saved = [], []

    def measure(plan, device, started, best):
        plans.append(plan)
        assert best is None
        started(plan.points()[0])
        return "report"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli.runner, "measure", measure)
    monkeypatch.setattr(cli, "_show", lambda done, plot: None)
    monkeypatch.setattr(report, "save", lambda done, file: saved.append((done, file)))
    kvfold_command("bench", "--json", tmp_path / "a.json", "--baseline", "--page-size", "16,32")
    kvfold_command("bench", "--override", "backend=triton", "--override", "head_slice=32")
    kvfold_command(
        "bench", "--warm-l2", "--batch", "7", "--no-overlap", "--compress-ratio", 4,
        "--prefetch-state",
    )  # fmt: skip
    first, second, third = plans
    assert first.baseline and first.override == {"reduce_warps": 1} and not first.warm_l2
    assert first.key == (512, 128, False, "bf16", "fp32", 4) and first.page_sizes == (16, 32)
    assert first.batches == (1, 16, 64, 128, 256, 512) and len(first.points()) == 36
    assert second.override == {"backend": "triton", "head_slice": 32} and not second.baseline
    assert third.prefetch_state and not second.prefetch_state
    assert third.warm_l2 and third.batches == (7,) and third.key[2] is False
    assert saved == [("report", tmp_path / "a.json")]


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        (WrongResult("wrong"), 1),
        (torch.OutOfMemoryError("full"), 1),
        (ValueError("bad"), 2),
        (OSError("gone"), 2),
    ],
)
def test_errors_while_measuring_are_one_line(no_gpu, monkeypatch, errors, code):
    def check(plan, device):
        raise errors

    monkeypatch.setattr(cli.runner, "check", check)
    assert refused(*QUICK, code=code) == f"kvfold: {errors}\n"


def test_the_module_is_the_bench_command_and_reaches_the_others(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "kvfold.bench", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert "--warm-l2" in run("--help").stdout
    done = run("table", "check", "none.yaml")
    assert done.returncode == 2 and done.stderr.startswith("kvfold: none.yaml")
