"""No test leaves transformers patched."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import kvfold.adapters.transformers as adapter  # noqa: E402


@pytest.fixture(autouse=True)
def unpatched():
    torch.set_num_threads(1)  # the tensors are small
    yield
    adapter.unpatch()
