"""Clusters of CTAs: what a kernel asks for, in its source and in the table."""

import dataclasses
import re

import pytest
from table_files import load, refused

from kvfold.codegen import TableError, Variant, gpu, instantiate, load_table, op_spec, render

OP = "paged_kv_compress_store"
PROBLEM = {
    "head_dim": 512,
    "compress_ratio": 128,
    "kv_dtype": "bf16",
    "state_dtype": "fp32",
    "next_n": 4,
}


def variant(head_slice: int, op: str = OP, **fields) -> Variant:
    spec = op_spec(op)
    tuning = spec.tuning(reduce_warps=8, head_slice=head_slice)
    return Variant(problem=spec.problem.of(PROBLEM | fields), backend="cuda", tuning=tuning)


def table_text(head_slice: int, **fields) -> str:
    values = PROBLEM | {"backend": "cuda", "reduce_warps": 8, "head_slice": head_slice} | fields
    row = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"version: 1\n{OP}:\n  - {{{row}}}\n"


@pytest.mark.parametrize(("head_slice", "cluster"), [(64, 8), (128, 4), (256, 2)])
def test_the_source_says_how_many_ctas_a_cluster_has(head_slice, cluster):
    one = variant(head_slice)
    assert one.launch.cluster == cluster
    source = instantiate(one)
    bounds = rf"__launch_bounds__\({one.launch.threads}, 1\)"
    kernel = rf"{bounds}\n__cluster_dims__\({cluster}\)\n{one.symbol}\("
    assert re.search(kernel, source)
    assert source.count("__cluster_dims__") == 1
    assert f"static constexpr int cluster = {cluster};" in source


@pytest.mark.parametrize("one", [variant(512), variant(64, "paged_kv_compress")])
def test_a_kernel_without_clusters_asks_for_none(one):
    source = instantiate(one)
    assert one.launch.cluster == 1
    assert "__cluster_dims__" not in source
    assert "static constexpr int cluster = 1;" in source


def test_the_rendered_table_has_the_clusters_of_its_variants():
    table = load_table()
    wanted = [
        (v.launch.cluster, v.symbol)
        for v in table.variants
        if v.backend == "cuda" and v.launch.cluster > 1
    ]
    found = re.findall(r"__cluster_dims__\((\d+)\)\n(\w+)\(", render(table).instantiations)
    assert len(wanted) > 100
    assert sorted((int(cluster), symbol) for cluster, symbol in found) == sorted(wanted)


def test_architectures_with_clusters():
    for arch in ("sm_90", "sm_90a", "sm_100", "sm_100a", "sm_103", "sm_120", "sm_121"):
        assert gpu.has_clusters(arch), arch
    for arch in ("any", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89"):
        assert not gpu.has_clusters(arch), arch


@pytest.mark.parametrize("head_slice", [8, 16, 32])
def test_a_cluster_of_more_than_8_ctas_is_refused(head_slice):
    with pytest.raises(TableError) as caught:
        variant(head_slice)
    error = caught.value
    assert (error.field, error.value, error.legal) == ("head_slice", head_slice, "64 or more")
    assert f"makes a cluster of {512 // head_slice} CTAs, more than 8" in str(error)
    assert gpu.MAX_CLUSTER == 8


def test_a_row_with_a_cluster_names_an_architecture_that_has_them(file):
    table = load(file, table_text(64, arch="sm_90"))
    assert [one.launch.cluster for one in table.variants] == [8]
    for arch in ("any", "sm_80"):
        error = refused(file, table_text(64, arch=arch))
        assert (error.field, error.value, error.legal) == ("arch", arch, "sm_90 or higher")
        assert f"{OP} row 1" in str(error) and "clusters of 8 CTAs" in str(error)
    assert refused(file, table_text(64)).field == "arch"
    load(file, table_text(128, head_dim=128, compress_ratio=4, reduce_warps=1))  # one CTA


def test_a_row_with_a_cluster_of_16_ctas_is_refused_with_its_place(file):
    error = refused(file, table_text(32, arch="sm_90"))
    assert (error.field, error.value) == ("head_slice", 32)
    assert f"{OP} row 1" in str(error)


def test_a_triton_variant_has_no_cluster():
    one = dataclasses.replace(variant(64), backend="triton")
    assert one.launch.cluster == 1
    one.check_arch("any")


def test_the_row_to_add_names_an_architecture_where_it_needs_clusters():
    fields = PROBLEM | {"head_dim": 256, "batch": 1}
    for arch, named in (("any", "sm_90"), ("sm_100", "sm_100")):
        with pytest.raises(TableError, match=rf"backend: cuda, arch: {named}, reduce_warps"):
            load_table().select(OP, arch=arch, **fields)
