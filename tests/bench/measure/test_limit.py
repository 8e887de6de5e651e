"""What efficiency is measured against."""

import pytest
import torch

from kvfold.bench.measure import limit


def test_the_limit_is_the_bytes_over_the_read_bandwidth_and_an_empty_node():
    best = limit.Limit(read_bandwidth_gbs=4000.0, copy_bandwidth_gbs=1.0, empty_node_us=0.5)
    assert best.us(0) == 0.5
    assert best.us(8_000_000) == 2.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPU tensors")
def test_the_triton_reader_reads_every_word():
    limit_triton = pytest.importorskip("kvfold.bench.measure.limit_triton", reason="no Triton")
    pytest.importorskip("triton")
    # One program, whose total is that of all words.
    kernels = limit_triton.TritonKernels(torch.device("cpu"), ctas=1, threads=32)
    kernels.empty()
    words = torch.randint(2**31 - 1, (1300,), dtype=torch.int32)
    kernels.read(words)
    assert kernels._sink.item() == 0
    total = 0
    for word in words.tolist():
        total ^= word
    words[-1] ^= total ^ 0x1E3779B9  # the one result that is stored
    kernels.read(words)
    assert kernels._sink.item() == 0x1E3779B9
