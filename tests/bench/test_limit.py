"""What efficiency is measured against."""

import pytest
import torch

from kvfold.bench import limit


def test_the_limit_is_the_bytes_over_the_read_bandwidth_and_an_empty_node():
    best = limit.Limit(read_bandwidth_gbs=4000.0, copy_bandwidth_gbs=1.0, empty_node_us=0.5)
    assert best.us(0) == 0.5
    assert best.us(8_000_000) == 2.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPU tensors")
def test_the_triton_reader_reads_every_word(monkeypatch):
    limit_triton = pytest.importorskip("kvfold.bench.limit_triton", reason="no Triton")
    monkeypatch.setattr(limit_triton, "CTAS", 1)  # so that one program's total is the whole
    monkeypatch.setattr(limit_triton, "BLOCK", 64)
    kernels = limit_triton.Kernels(torch.device("cpu"))
    kernels.empty()
    words = torch.randint(2**31 - 1, (300,), dtype=torch.int32)
    kernels.read(words)
    assert kernels._sink.item() == 0
    total = 0
    for word in words.tolist():
        total ^= word
    words[-1] ^= total ^ 0x1E3779B9  # the one result that is stored
    kernels.read(words)
    assert kernels._sink.item() != 0
    assert kernels._sink.item() == 0x1E3779B9
