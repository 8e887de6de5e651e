import dataclasses
import re

import pytest
from hypothesis import given
from strategies import OP, property_test, valid_rows
from table_files import ROW, load

from kvfold.codegen import instantiate, load_table, op_spec, render

C_TYPES = {"bf16": "bf16", "fp32": "float"}
INCLUDE = f'#include "ops/{OP}/kernel.cuh"'


def kernels(source: str) -> list[str]:
    """Names of the kernels that a CUDA source defines."""
    return re.findall(r'extern "C" __global__ void __launch_bounds__\(\d+, \d+\)\n(\w+)\(', source)


@property_test
@given(rows=valid_rows())
def test_every_cuda_variant_that_the_table_finds_is_instantiated_once(file, rows):
    table = load(file, rows)
    symbols = {
        bucket.variant.symbol
        for group, buckets in table.groups.items()
        for bucket in buckets
        if group.backend == "cuda"
    }
    assert symbols == {v.symbol for v in table.variants if v.backend == "cuda"}
    instantiated = kernels(render(table).instantiations)
    assert set(instantiated) == symbols
    assert len(set(instantiated)) == len(instantiated)


def test_the_source_bears_the_fingerprint():
    table = load_table()
    rendered = render(table)
    assert rendered.fingerprint == table.fingerprint
    assert table.fingerprint in rendered.instantiations.splitlines()[0]


@property_test
@given(rows=valid_rows())
def test_instantiation_says_what_the_variant_is(file, rows):
    for variant in load(file, rows).variants:
        if variant.backend != "cuda":
            continue
        source = instantiate(variant)
        numbers = re.findall(r"static constexpr (int|bool) (\w+) = (\w+);", source)
        types = re.findall(r"using (\w+) = (\w+);", source)
        problem, tuning, launch = variant.problem, variant.tuning, variant.launch
        expected = {
            "head_dim": problem.head_dim,
            "compress_ratio": problem.compress_ratio,
            "overlap": problem.overlap,
            "next_n": problem.next_n,
            "ape_in_state": problem.ape_in_state,
            "reduce_warps": tuning.reduce_warps,
            "head_slice": tuning.head_slice,
            "fused": tuning.fused,
            "requests_per_cta": tuning.requests_per_cta,
            "deal": tuning.deal,
            "store_bytes": tuning.store_bytes,
            "min_ctas": tuning.min_ctas,
            "threads": launch.threads,
            "shared_bytes": launch.shared_bytes,
            "cluster": launch.cluster,
            **launch.constants,
        }
        assert {name: value for _, name, value in numbers} == {
            name: str(value).lower() for name, value in expected.items()
        }
        bools = {name for kind, name, _ in numbers if kind == "bool"}
        assert bools == {name for name, value in expected.items() if isinstance(value, bool)}
        assert dict(types) == {
            "kv_dtype": C_TYPES[problem.kv_dtype],
            "state_dtype": C_TYPES[problem.state_dtype],
        }
        assert f"__launch_bounds__({launch.threads}, {tuning.min_ctas})\n" in source
        assert source.startswith(f"{INCLUDE}\n")


@property_test
@given(rows=valid_rows())
def test_one_variant_alone_reads_as_in_the_whole(file, rows):
    table = load(file, rows)
    rendered = render(table)
    bodies = [instantiate(v).split("\n", 1)[1] for v in table.variants if v.backend == "cuda"]
    first, *rest = rendered.instantiations.split("\n", 2)
    assert first.startswith("// ")
    if bodies:
        include, whole = rest
        assert include == INCLUDE
        assert len(whole) == sum(map(len, bodies))
        assert all(whole.count(body) == 1 for body in bodies)
    else:
        assert rest == [""]


def test_instantiation_depends_on_no_table(file):
    variant = load_table().variants[0]
    assert variant.backend == "cuda"
    fields = variant.problem.values() | {"backend": "cuda"} | variant.tuning.values()
    alone = load(file, [fields])
    assert alone.fingerprint != load_table().fingerprint
    assert instantiate(alone.variants[0]) == instantiate(variant)
    assert alone.fingerprint not in instantiate(variant)


def test_only_cuda_is_instantiated():
    variant = dataclasses.replace(load_table().variants[0], backend="triton")
    with pytest.raises(ValueError, match="has backend triton; accepted: cuda"):
        instantiate(variant)


def test_headers_declare_the_parameters_of_the_ops_that_have_kernels(file):
    rendered = render(load(file, [ROW, ROW | {"head_dim": 128, "backend": "triton"}]))
    (name,) = rendered.headers
    assert name == f"ops/{OP}/params.cuh"
    struct = op_spec(OP).param_struct
    declared = re.findall(r"^  ([\w ]+\*?) (\w+);$", rendered.headers[name], re.MULTILINE)
    assert declared == [tuple(member) for member in struct.members()]
    assert f"sizeof(Params) == {struct.size}" in rendered.headers[name]
    assert render(load(file, [ROW | {"backend": "triton"}])).headers == {}


def test_generated_text_is_clean():
    rendered = render(load_table())
    for source in (rendered.instantiations, *rendered.headers.values()):
        assert source.endswith("\n") and not source.endswith("\n\n")
        assert all(line == line.rstrip() for line in source.splitlines())
        assert "\n\n\n\n" not in source
