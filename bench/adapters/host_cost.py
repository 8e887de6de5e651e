"""Times what adapters cost on the host: their calls, and the bare calls of kvfold's ops."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable

import torch

from kvfold.bench.environment import environment
from kvfold.bench.measure import timing
from kvfold.bench.records import AdapterReport, AdapterRow

ENGINES = ("trtllm", "sglang", "vllm")
REPEATS = 5  # of each pair; the two are measured in turn


def measure(device: torch.device, started: Callable[[str], None]) -> AdapterReport:
    """Times the calls of all adapters on the GPU `device`, which must be torch's current one.

    Args:
        started: called with every call before it is measured.
    """
    rows = []
    for engine in ENGINES:
        for case in importlib.import_module(f"kvfold.bench.adapters.{engine}").cases(device):
            started(f"{engine}: {case.name}")
            for call in (case.adapter, case.ops):  # the first calls compile and remember
                for _ in range(3):
                    call()
            pairs = [(timing.host(case.adapter), timing.host(case.ops)) for _ in range(REPEATS)]
            rows.append(
                AdapterRow(
                    engine=engine,
                    call=case.name,
                    adapter_us=statistics.median(adapter for adapter, _ in pairs),
                    ops_us=statistics.median(ops for _, ops in pairs),
                )
            )
    return AdapterReport(**environment(device), rows=rows)
