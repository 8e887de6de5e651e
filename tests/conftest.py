"""Without a GPU, Triton kernels run under Triton's interpreter and tests marked gpu are skipped."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # or the workers' threads are many times the machine's

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def pytest_collection_modifyitems(items):
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU: torch finds none"))
