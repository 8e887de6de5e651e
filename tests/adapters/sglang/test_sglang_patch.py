"""patch and unpatch, with modules that stand for SGLang's."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from kvfold.adapters import sglang

OPS = "sglang.kernels.ops.attention.dsv4"
LAYERS = "sglang.srt.layers.attention.dsv4"
# The names that each module holds.
NAMES = {
    f"{OPS}.compress": ("compress_forward", "compress_norm_rope_store"),
    OPS: ("compress_forward", "compress_norm_rope_store"),
    f"{LAYERS}.compressor_v2": ("compress_forward", "compress_norm_rope_store"),
    f"{LAYERS}.compressor_trtllm": ("compress_forward",),
}


class Compressor:
    def __init__(self):
        self.ape = torch.nn.Parameter(torch.arange(1024.0).view(4, 256))

    def _apply_ape_hotfix(self):
        self.ape.data.copy_(torch.cat(self.ape.data.chunk(2, dim=1)).view(4, 256))


@pytest.fixture
def engine(monkeypatch):
    """Modules of the names of SGLang's; gives the functions that they began with."""
    for path in [*NAMES, f"{LAYERS}.compressor"]:
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
    original = {}
    for path, names in NAMES.items():
        for name in names:
            original[path, name] = lambda: None
            monkeypatch.setattr(sys.modules[path], name, original[path, name], raising=False)
    module = sys.modules[f"{LAYERS}.compressor"]
    monkeypatch.setattr(module, "Compressor", Compressor, raising=False)
    yield original
    sglang.unpatch()


def found(engine):
    return {key: getattr(sys.modules[key[0]], key[1]) for key in engine}


def test_the_functions_are_replaced_and_put_back(engine):
    own = Compressor._apply_ape_hotfix
    sglang.patch()
    sglang.patch()  # does nothing
    assert found(engine) == {key: getattr(sglang, key[1]) for key in engine}
    assert not hasattr(sys.modules[f"{LAYERS}.compressor_trtllm"], "compress_norm_rope_store")
    sglang.unpatch()
    assert found(engine) == engine
    assert Compressor._apply_ape_hotfix is own
    sglang.unpatch()  # does nothing


def test_an_ape_that_is_loaded_again(engine):
    sglang.patch()
    compressor = Compressor()
    with torch.no_grad():
        compressor._apply_ape_hotfix()
        view = compressor.ape.view(-1, 128)
        ape = sglang.kept.kvfold_ape(view, 4, torch.float32).tensor
        assert torch.equal(ape, torch.arange(1024.0).view(4, 256))
        compressor.ape.data.copy_(torch.arange(1024.0).view(4, 256) * 3)
        compressor._apply_ape_hotfix()
        assert torch.equal(ape, torch.arange(1024.0).view(4, 256) * 3)


def test_without_sglang(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError):
        sglang.patch()
    assert not sglang.patching._replaced


def test_the_wheel_has_what_is_replaced():
    """Where SGLang can be imported."""
    pytest.importorskip("sglang.kernels.ops.attention.dsv4.compress", exc_type=ImportError)
    for path, names in NAMES.items():
        module = importlib.import_module(path)
        assert all(hasattr(module, name) for name in names)
