"""The launch that makes metadata against torch: compiled where there is a GPU, else interpreted."""

import json
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from sglang_plans import Simulation, StateLayout

from kvfold.adapters.sglang import metadata_kernels, metadata_reference
from kvfold.adapters.sglang.metadata import (
    DecodeMetadata,
    PrefillMetadata,
    Requests,
    RowMetadata,
)
from kvfold.adapters.sglang.plan import words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = [StateLayout(4, 8), StateLayout(4, 16, swa_page=32), StateLayout(128, 256)]
BEFORE = -1234567  # in metadata that is not filled

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, BEFORE, dtype=dtype, device=DEVICE)


def requests(batch: int, pages: int) -> Requests:
    return Requests(empty(batch), empty(batch + 1), empty(batch + 1), empty(batch, pages))


def tensors(metadata: object) -> dict[str, torch.Tensor]:
    """All tensors, by name."""
    found = {}
    for one in fields(metadata):  # pyright: ignore
        value = getattr(metadata, one.name)
        named = tensors(value) if is_dataclass(value) else {"": value}
        found |= {f"{one.name}.{name}": x for name, x in named.items()}
    return found


def fill_decode(module, entries, ratio):
    batch = len(entries)
    metadata = DecodeMetadata(requests(batch, 2 if ratio == 4 else 1), empty(batch))
    module.fill_decode(entries.clone(), ratio, metadata)
    return tensors(metadata)


def fill_prefill(module, windows, rows, num_tokens, ratio):
    windows, runs = windows.clone(), min(len(windows), len(rows))
    reduce = requests(2 * runs, 1)
    pages = empty(2 * runs + num_tokens // ratio + 2)
    metadata = PrefillMetadata(reduce, requests(2 * len(rows), 1))
    module.fill_prefill(windows, rows.clone(), num_tokens, ratio, metadata, pages)
    found = tensors(metadata)
    del found["reduce.block_table."]  # `pages` takes its place
    return found | {"windows": windows, "pages": pages}


def fill_rows(module, windows, out_loc, ratio):
    metadata = RowMetadata(empty(len(windows)), empty(len(windows), dtype=torch.int64))
    module.fill_rows(windows.clone(), out_loc, ratio, metadata)
    return tensors(metadata)


def assert_same(fill, *arguments):
    on_cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
    global DEVICE
    before, DEVICE = DEVICE, "cpu"
    expected = fill(metadata_reference, *on_cpu)
    DEVICE = before
    found = fill(metadata_kernels, *arguments)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.tolist() == expected[name].tolist(), name
        assert not (tensor == BEFORE).any(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_plans(layout, seed, monkeypatch):
    # Several blocks for few entries.
    monkeypatch.setattr(metadata_kernels, "BLOCK", 4)
    monkeypatch.setattr(metadata_kernels, "PREFILL_BLOCK", 64)
    requests = 9 if layout.ratio == 4 else 4
    simulation = Simulation(layout, 1, requests, most_tokens=1280, device=DEVICE, seed=seed)
    counts = [simulation.random.randint(1, 3 * layout.ratio // 2) for _ in simulation.requests]
    counts[seed] = 2 * layout.ratio + 30
    for shuffled, padded in ((False, False), (True, False), (True, True)):
        call = simulation.extend(simulation.requests, counts, shuffled=shuffled, padded=padded)
        windows, rows = words(call.plan[1]), words(call.plan[2])
        assert_same(fill_rows, windows, call.out_loc, layout.ratio)
        assert_same(fill_prefill, windows, rows, len(call.kv_score), layout.ratio)
        call = simulation.decode(simulation.requests)
        assert_same(fill_decode, words(call.plan[1]), layout.ratio)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_entries_may_be_invalid(layout):
    windows = torch.tensor([[-1, 0, -1, -1]] * 5, dtype=torch.int32, device=DEVICE)
    rows = torch.full((5, 2), -1, dtype=torch.int32, device=DEVICE)
    assert_same(fill_prefill, windows, rows, 5, layout.ratio)
    assert_same(fill_rows, windows, torch.arange(5, device=DEVICE), layout.ratio)
    assert_same(fill_decode, windows, layout.ratio)


def integers(shape, generator):
    """Any int32; the ends of ranges and small values are frequent."""
    corners = torch.tensor([-(2**31), -1, 0, 1, 4, 7, 8, 128, 0xFFFF, 1 << 16, 2**31 - 1])
    nonsense = torch.randint(-(2**31), 2**31, shape, generator=generator)
    chosen = corners[torch.randint(len(corners), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.4, nonsense, chosen).int()


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("seed", range(8))
def test_any_plan_is_safe(ratio, seed, monkeypatch):
    """The kernels write inside of their tensors, whatever a plan holds. Guards lie around them."""
    monkeypatch.setattr(metadata_kernels, "BLOCK", 4)
    monkeypatch.setattr(metadata_kernels, "PREFILL_BLOCK", 16)
    generator = torch.Generator().manual_seed(seed)
    guarded = []

    def between_guards(*shape, dtype=torch.int32, **_):
        size = torch.Size(shape).numel()
        storage = torch.full((size + 64,), BEFORE, dtype=dtype, device=DEVICE)
        guarded.append(storage)
        return storage[32 : 32 + size].view(shape)

    monkeypatch.setitem(globals(), "empty", between_guards)
    monkeypatch.setattr(torch, "empty", lambda *shape, **more: between_guards(*shape, **more))
    windows = integers((19, 4), generator).to(DEVICE)
    rows = integers((23 - 20 * (seed % 2), 2), generator).to(DEVICE)
    if seed % 2:  # more runs than a call has requests
        windows[:, :2] = torch.tensor([[8, i + (7 << 16)] for i in range(19)])
    out_loc = torch.arange(31, device=DEVICE)
    fill_decode(metadata_kernels, windows, ratio)
    fill_rows(metadata_kernels, windows, out_loc, ratio)
    fill_prefill(metadata_kernels, windows, rows, 31, ratio)
    assert len(guarded) == 5 + 2 + 10
    for storage in guarded:
        assert (storage[:32] == BEFORE).all() and (storage[-32:] == BEFORE).all()


def test_the_kernels_compile_and_specialize_on_nothing(tmp_path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_sglang_triton.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"barriers": [3, 3], "specialized": []}
