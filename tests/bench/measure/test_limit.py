"""What efficiency is measured against."""

import pytest
import torch

from kvfold.bench.measure import limit
from kvfold.runtime import compiler


def test_the_limit_is_the_bytes_over_the_read_bandwidth_and_an_empty_node():
    best = limit.Limit(read_bandwidth_gbs=4000.0, copy_bandwidth_gbs=1.0, empty_node_us=0.5)
    assert best.us(0) == 0.5
    assert best.us(8_000_000) == 2.5


def test_without_nvrtc_the_limit_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiler, "unavailable", lambda: "ImportError: no cupy")
    says = r"the limit needs NVRTC \(ImportError: no cupy\); pip install 'kvfold\[cuda\]'"
    with pytest.raises(ValueError, match=says):
        limit.measure(torch.device("cpu"))
