import dataclasses
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import OP, property_test, text, valid_rows

from kvfold.codegen import instantiate, load_table, render

CTYPES = {"bf16": "bf16", "fp32": "float"}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    file = tmp_path_factory.mktemp("render") / "own.yaml"

    def load(rows):
        file.write_text(text(rows))
        return load_table(file)

    return load


def dispatcher(rendered):
    names = {}
    exec(rendered.dispatch, names)
    return names


def kernels(source: str) -> list[str]:
    """Names of the kernels that a CUDA source defines."""
    return re.findall(r'extern "C" __global__ void __launch_bounds__\(\d+, \d+\)\n(\w+)\(', source)


@property_test
@given(rows=valid_rows())
def test_instantiated_is_dispatchable_is_the_table(load, rows):
    table = load(rows)
    rendered = render(table)
    symbols = {backend: set() for backend in ("cuda", "triton")}
    for (_, backend, *_), buckets in dispatcher(rendered)["BUCKETS"].items():
        symbols[backend] |= {symbol for _, symbol in buckets}
    assert symbols["cuda"] | symbols["triton"] == {v.symbol for v in table.variants}
    assert symbols["triton"] == {v.symbol for v in table.variants if v.backend == "triton"}
    instantiated = kernels(rendered.instantiations)
    assert set(instantiated) == symbols["cuda"]
    assert len(set(instantiated)) == len(instantiated)


@property_test
@given(rows=valid_rows(), data=st.data())
def test_dispatcher_agrees_with_select(load, rows, data):
    table = load(rows)
    select = dispatcher(render(table))["select"]
    for (op, backend, arch, *key), buckets in table.groups.items():
        edges = {bucket.min_batch for bucket in buckets}
        edges |= {bucket.max_batch for bucket in buckets if bucket.max_batch}
        problem = buckets[0].variant.problem
        for batch in {*edges, *data.draw(st.lists(st.integers(1, 2100), max_size=4))}:
            variant = table.select(op, batch=batch, backend=backend, arch=arch, **problem)
            assert select(op, backend, arch, tuple(key), batch) == variant.symbol


def test_dispatcher_agrees_on_every_batch_size_of_the_shipped_table():
    table = load_table()
    select = dispatcher(render(table))["select"]
    keys = {variant.key: variant.problem for variant in table.variants}
    some = [key for key in keys if key[-1] == 4]  # next_n does not change the buckets
    for key in some:
        for backend in ("cuda", "triton"):
            for batch in (*range(1, 130), *range(130, 2001, 17)):
                for arch in ("sm_90", "sm_120"):  # one that has rows of its own, one that has none
                    variant = table.select(OP, batch=batch, backend=backend, arch=arch, **keys[key])
                    assert select(OP, backend, arch, key, batch) == variant.symbol


def test_dispatcher_falls_back_to_any_and_knows_no_more(load):
    row = {
        "head_dim": 512,
        "compress_ratio": 128,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
        "next_n": 4,
        "backend": "cuda",
        "reduce_warps": 8,
    }
    own = row | {"arch": "sm_90", "head_slice": 32}
    table = load([row | {"head_slice": 64}, own, own | {"head_dim": 128}])
    select = dispatcher(render(table))["select"]
    key = (512, 128, False, "bf16", "fp32", 4)
    symbol = "paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s"
    assert select(OP, "cuda", "sm_90", key, 5) == f"{symbol}32"
    assert select(OP, "cuda", "sm_80", key, 5) == f"{symbol}64"
    assert select(OP, "cuda", "any", key, 5) == f"{symbol}64"
    assert select(OP, "cuda", "sm_80", (128, *key[1:]), 5) is None
    assert select(OP, "triton", "sm_90", key, 5) is None
    assert select("norm", "cuda", "sm_90", key, 5) is None


def test_both_texts_bear_the_fingerprint():
    table = load_table()
    rendered = render(table)
    assert rendered.fingerprint == table.fingerprint
    assert dispatcher(rendered)["FINGERPRINT"] == table.fingerprint
    assert table.fingerprint in rendered.dispatch.splitlines()[0]
    assert table.fingerprint in rendered.instantiations.splitlines()[0]


@property_test
@given(rows=valid_rows())
def test_instantiation_says_what_the_variant_is(load, rows):
    for variant in load(rows).variants:
        if variant.backend != "cuda":
            continue
        source = instantiate(variant)
        ints = re.findall(r"static constexpr (?:int|bool) (\w+) = (\w+);", source)
        types = re.findall(r"using (\w+) = (\w+);", source)
        names = ("head_dim", "compress_ratio", "next_n", "reduce_warps", "head_slice")
        expected = {
            name: str(getattr(variant, name))
            for name in (*names, "threads", "shared_bytes", "listed", "items_at_once")
        }
        persistent = variant.schedule == "persistent"
        flags = {"overlap": variant.overlap, "persistent": persistent}
        assert dict(ints) == expected | {name: str(flag).lower() for name, flag in flags.items()}
        assert dict(types) == {
            "kv_t": CTYPES[variant.kv_dtype],
            "state_t": CTYPES[variant.state_dtype],
        }
        assert f"__launch_bounds__({variant.threads}, {variant.min_ctas})\n" in source
        assert source.startswith('#include "paged_kv_compress/kernel.cuh"\n')


@property_test
@given(rows=valid_rows())
def test_one_variant_alone_reads_as_in_the_whole(load, rows):
    table = load(rows)
    rendered = render(table)
    bodies = [instantiate(v).split("\n", 1)[1] for v in table.variants if v.backend == "cuda"]
    first, *rest = rendered.instantiations.split("\n", 2)
    assert first.startswith("// ")
    if bodies:
        include, whole = rest
        assert include == '#include "paged_kv_compress/kernel.cuh"'
        assert len(whole) == sum(map(len, bodies))
        assert all(whole.count(body) == 1 for body in bodies)
    else:
        assert rest == [""]


def test_instantiation_depends_on_no_table(load):
    variant = load_table().variants[0]
    assert variant.backend == "cuda"
    alone = load([variant.problem | variant.tuning])
    assert alone.fingerprint != load_table().fingerprint
    assert instantiate(alone.variants[0]) == instantiate(variant)
    assert alone.fingerprint not in instantiate(variant)


def test_only_cuda_is_instantiated():
    variant = dataclasses.replace(load_table().variants[0], backend="triton")
    with pytest.raises(ValueError, match="has backend triton; accepted: cuda"):
        instantiate(variant)


def test_generated_text_is_clean():
    rendered = render(load_table())
    for source in (rendered.instantiations, rendered.dispatch):
        assert source.endswith("\n") and not source.endswith("\n\n")
        assert all(line == line.rstrip() for line in source.splitlines())
        assert "\n\n\n\n" not in source


def test_loading_and_rendering_is_fast():
    def seconds():
        start = time.perf_counter()
        render(load_table())
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.05
