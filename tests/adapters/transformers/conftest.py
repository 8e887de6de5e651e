"""No test leaves transformers patched. Without transformers there are no tests here."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def unpatched():
    torch.set_num_threads(1)  # the tensors are small
    yield
    importlib.import_module("kvfold.adapters.transformers").unpatch()
