"""From a problem to its kernel: tables, backends, and what the log says about it."""

import importlib.util
import logging

import pytest
import torch

import kvfold
from kvfold.codegen import TableError, Variant, load_table, op_spec
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import compiler, dispatch
from kvfold.runtime.torch_op import torch_op

OP = "paged_kv_compress"
CPU = torch.device("cpu")
PROBLEM = Problem(head_dim=512, compress_ratio=128, kv_dtype="bf16", state_dtype="fp32", next_n=4)
OWN = Problem(head_dim=256, compress_ratio=128, kv_dtype="bf16", state_dtype="fp32", next_n=4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("KVFOLD_BACKEND", raising=False)
    dispatch.reload()
    yield
    dispatch.reload()


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets an H200 be there as far as choosing goes; gives the device."""
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    return torch.device("cuda", 0)


@pytest.fixture
def in_force(monkeypatch, tmp_path):
    """Puts a table with these rows in force."""

    def put(*rows):
        file = tmp_path / "table.yaml"
        file.write_text("\n".join(["version: 1", f"{OP}:", *rows, ""]))
        monkeypatch.setenv("KVFOLD_CONFIG", str(file))
        dispatch.reload()

    return put


def arguments(**changes):
    """A small call's arguments."""
    fields = {"head_dim": 8, "compress_ratio": 4, "kv_dtype": "bf16", "state_dtype": "fp32"}
    problem = Problem(**fields | {"next_n": 4} | changes)
    return WORKLOAD.make(problem, 1, "all-hit", WORKLOAD.options(), CPU).arguments


def compress(call) -> None:
    args, kwargs = call.args_and_kwargs()
    kvfold.paged_kv_compress(*args, **kwargs)


# ---- the table's choice --------------------------------------------------------------------------


def test_every_problem_and_size_dispatches_to_the_tables_choice(on_gpu, monkeypatch):
    table = load_table()
    problems = {(b.variant.problem, b.variant.backend) for b in table.buckets}
    for backend in ("cuda", "triton"):
        monkeypatch.setenv("KVFOLD_BACKEND", backend)
        dispatch.reload()
        for problem in (one for one, served_by in problems if served_by == backend):
            axis = op_spec(problem.op).axis
            for number in (1, 16, 48, 49, 512, 100_000):
                size = {axis: number}
                chosen = dispatch.select(problem, number, on_gpu)
                assert chosen.problem == problem
                assert chosen == table.select(
                    problem.op, backend=backend, arch="sm_90", **size, **problem.values()
                )


def test_swapped_dtypes_do_not_dispatch_to_the_other_problems_kernel(on_gpu, in_force):
    row = "{head_dim: 512, compress_ratio: 128, next_n: 4, backend: cuda, reduce_warps: 8,"
    in_force(f"  - {row} head_slice: 64, kv_dtype: bf16, state_dtype: fp32}}")
    assert dispatch.select(PROBLEM, 1, on_gpu).problem == PROBLEM
    values = PROBLEM.values() | {"kv_dtype": "fp32", "state_dtype": "bf16"}
    with pytest.raises(TableError, match="kv_dtype: fp32, state_dtype: bf16"):
        dispatch.select(Problem(**values), 1, on_gpu)


def test_without_nvrtc_the_triton_rows_serve_and_the_log_says_so_once(on_gpu, monkeypatch, caplog):
    monkeypatch.setattr(compiler, "unavailable", lambda: "no cupy here")
    with caplog.at_level(logging.INFO, "kvfold"):
        for batch in (1, 2):
            assert dispatch.select(PROBLEM, batch, on_gpu).backend == "triton"
    assert caplog.text.count("no cupy here") == 1


def test_a_problem_with_triton_rows_alone_is_served_by_them(on_gpu, in_force, monkeypatch):
    in_force(
        "  - {head_dim: 256, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 4,\n"
        "     backend: triton, reduce_warps: 4, head_slice: 32}\n"
    )
    assert dispatch.select(OWN, 7, on_gpu).backend == "triton"
    monkeypatch.setenv("KVFOLD_BACKEND", "cuda")
    dispatch.reload()
    with pytest.raises(TableError, match="has no cuda row for arch sm_90"):
        dispatch.select(OWN, 7, on_gpu)


def test_the_error_for_a_missing_row_holds_a_row_that_serves_the_problem(on_gpu, in_force):
    with pytest.raises(TableError, match="add to paged_kv_compress") as caught:
        dispatch.select(OWN, 7, on_gpu)
    in_force(str(caught.value).splitlines()[-1])
    assert dispatch.select(OWN, 7, on_gpu).problem == OWN


def test_a_variant_that_needs_more_shared_memory_than_the_device_has_is_not_bound(monkeypatch):
    monkeypatch.setattr(dispatch, "arch_of", lambda device: "sm_120")
    variant = Variant(
        problem=PROBLEM, backend="cuda", tuning=Tuning(reduce_warps=8, head_slice=128)
    )
    with pytest.raises(TableError, match="takes 131072 bytes of shared memory per CTA, and arch"):
        dispatch.bind(variant, torch.device("cuda", 0))


# ---- backends ------------------------------------------------------------------------------------


def test_cpu_tensors_run_the_reference(caplog):
    with caplog.at_level(logging.INFO, "kvfold"):
        assert dispatch.backend_for("cpu") == "reference"
        dispatch.backend_for("cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "backend for cpu tensors: reference (the tensors are on 'cpu')"
    ]


def test_a_gpu_without_nvrtc_and_triton_runs_the_reference_and_the_log_says_why(
    monkeypatch, caplog
):
    monkeypatch.setattr(compiler, "unavailable", lambda: "no cupy here")
    without_triton(monkeypatch)
    with caplog.at_level(logging.INFO, "kvfold"):
        assert dispatch.backend_for("cuda") == "reference"
    assert caplog.messages == [
        "backend for cuda tensors: reference (triton is not installed, and no CUDA variants:"
        " no cupy here)"
    ]


def test_an_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"'cudnn'; accepted: cuda, triton, reference"):
        compress(arguments())


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "")
    assert dispatch.backend_for("cpu") == "reference"
    call = arguments()
    compress(call)
    assert call.output.isfinite().all()


def test_an_empty_variable_leaves_triton_rows_to_serve(on_gpu, in_force, monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "")
    in_force(
        "  - {head_dim: 256, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 4,\n"
        "     backend: triton, reduce_warps: 4, head_slice: 32}\n"
    )
    assert dispatch.select(OWN, 7, on_gpu).backend == "triton"


def test_cuda_cannot_serve_cpu_tensors(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda', but the tensors are on 'cpu'"):
        dispatch.backend_for("cpu")


def test_cuda_cannot_be_forced_without_nvrtc(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "cuda")
    monkeypatch.setattr(compiler, "unavailable", lambda: "no cupy here")
    with pytest.raises(ValueError, match=r"'cuda', but no cupy here$"):
        dispatch.backend_for("cuda")


def without_triton(monkeypatch):
    """Lets triton not be installed."""
    find_spec = importlib.util.find_spec

    def find(name, *rest):
        return None if name == "triton" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_triton_cannot_be_forced_where_it_is_not_installed(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    without_triton(monkeypatch)
    with pytest.raises(ValueError) as caught:
        compress(arguments())
    assert str(caught.value) == "KVFOLD_BACKEND is 'triton', but triton is not installed"


def test_triton_cannot_be_forced_on_cpu_tensors_without_its_interpreter(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as caught:
        compress(arguments())
    assert str(caught.value) == (
        "KVFOLD_BACKEND is 'triton', but the tensors are on 'cpu', where TRITON_INTERPRET=1 is"
        " needed"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton is compiled here, not interpreted")
def test_triton_can_be_forced_on_cpu_tensors(monkeypatch):
    reference, triton = arguments(head_dim=128), arguments(head_dim=128)
    compress(reference)
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    dispatch.reload()
    compress(triton)
    assert dispatch.launcher.cache_info().currsize == 1
    assert torch.equal(triton.paged_kv, reference.paged_kv)
    torch.testing.assert_close(triton.output, reference.output, equal_nan=True)


def test_run_variant_refuses_another_problem():
    variant = load_table().variants[0]
    with pytest.raises(ValueError, match=f"{variant.symbol} solves"):
        torch_op(OP).run_variant(variant, *arguments().args())
