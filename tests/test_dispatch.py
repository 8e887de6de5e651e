"""From a problem to its kernel: tables, backends, and what is said on the way."""

import logging

import pytest
import torch

import kvfold
from kvfold import dispatch, nvrtc
from kvfold.bench import cases
from kvfold.codegen import TableError, load_table

OP = "paged_kv_compress"
CPU = torch.device("cpu")
KEY = (512, 128, False, "bf16", "fp32", 4)


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
    return torch.device("cuda", 0)


def test_every_default_key_and_batch_dispatches_to_the_tables_choice(on_gpu, monkeypatch):
    table = load_table()
    for backend in ("cuda", "triton"):
        monkeypatch.setenv("KVFOLD_BACKEND", backend)
        monkeypatch.setattr(nvrtc, "available", lambda: None)
        dispatch.reload()
        for variant in table.variants:
            for batch in (1, 16, 48, 49, 512, 100_000):
                chosen = dispatch.select(OP, variant.key, batch, on_gpu)
                assert chosen.key == variant.key
                assert chosen == table.select(
                    OP, batch=batch, backend=backend, arch="sm_90", **variant.problem
                )


def test_cpu_tensors_run_the_reference(caplog):
    with caplog.at_level(logging.INFO, "kvfold"):
        assert dispatch.backend_for("cpu") == "reference"
        dispatch.backend_for("cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "backend for cpu tensors: reference (the tensors are on 'cpu')"
    ]


def test_without_nvrtc_the_triton_rows_serve_said_once(on_gpu, monkeypatch, caplog):
    monkeypatch.setattr(nvrtc, "available", lambda: "no cupy here")
    with caplog.at_level(logging.INFO, "kvfold"):
        for batch in (1, 2):
            assert dispatch.select(OP, KEY, batch, on_gpu).backend == "triton"
    assert caplog.text.count("no cupy here") == 1


def test_a_problem_with_triton_rows_alone_is_served_by_them(on_gpu, monkeypatch, tmp_path):
    table = tmp_path / "table.yaml"
    table.write_text(
        "version: 1\npaged_kv_compress:\n"
        "  - {head_dim: 256, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 4,\n"
        "     backend: triton, reduce_warps: 4, head_slice: 32}\n"
    )
    monkeypatch.setenv("KVFOLD_CONFIG", str(table))
    monkeypatch.setattr(nvrtc, "available", lambda: None)
    dispatch.reload()
    key = (256, 128, False, "bf16", "fp32", 4)
    assert dispatch.select(OP, key, 7, on_gpu).backend == "triton"


def test_a_missing_row_is_an_error_with_a_row_that_mends_it(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "available", lambda: None)
    key = (256, 128, False, "bf16", "fp32", 4)
    with pytest.raises(TableError, match="add to paged_kv_compress") as caught:
        dispatch.select(OP, key, 7, on_gpu)
    row = str(caught.value).splitlines()[-1]
    table = tmp_path / "table.yaml"
    table.write_text(f"version: 1\npaged_kv_compress:\n{row}\n")
    monkeypatch.setenv("KVFOLD_CONFIG", str(table))
    dispatch.reload()
    assert dispatch.select(OP, key, 7, on_gpu).key == key


@pytest.mark.parametrize("forced", ["", "cudnn"])
def test_an_unknown_backend_is_an_error(forced, monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", forced)
    with pytest.raises(ValueError, match=r"KVFOLD_BACKEND is .*accepted: cuda, triton, reference"):
        kvfold.paged_kv_compress(*cases.make(batch=1, head_dim=8, compress_ratio=4).args())


def test_cuda_cannot_serve_cpu_tensors(monkeypatch):
    monkeypatch.setenv("KVFOLD_BACKEND", "cuda")
    with pytest.raises(ValueError, match="the tensors are on 'cpu'"):
        dispatch.backend_for("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton is compiled here, not interpreted")
def test_triton_can_be_forced_on_cpu_tensors(monkeypatch):
    problem = {"head_dim": 128, "compress_ratio": 4, "next_n": 4, "batch": 2}
    reference, triton = cases.make(**problem), cases.make(**problem)
    kvfold.paged_kv_compress(*reference.args())
    monkeypatch.setenv("KVFOLD_BACKEND", "triton")
    dispatch.reload()
    kvfold.paged_kv_compress(*triton.args())
    assert dispatch.launcher.cache_info().currsize == 1
    assert torch.equal(triton.paged_kv, reference.paged_kv)
    torch.testing.assert_close(triton.output, reference.output, equal_nan=True)


def test_run_variant_refuses_another_problem():
    from kvfold.ops.paged_kv_compress.op import run_variant

    variant = load_table().variants[0]
    with pytest.raises(ValueError, match=f"{variant.symbol} solves"):
        run_variant(variant, *cases.make(batch=1, head_dim=8, compress_ratio=4).args())
