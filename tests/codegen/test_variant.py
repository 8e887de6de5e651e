import dataclasses
import itertools
import re

import pytest
from strategies import OP

from kvfold.codegen import Bucket, Group, Launch, TableError, Variant, op_spec
from kvfold.ops.paged_kv_compress.spec import Problem, Tuning, window_shape

PRODUCTION = Variant(
    problem=Problem(
        head_dim=512, compress_ratio=128, kv_dtype="bf16", state_dtype="fp32", next_n=4
    ),
    backend="cuda",
    tuning=Tuning(reduce_warps=8, head_slice=64),
)


def make(**changes) -> Variant:
    """PRODUCTION with other values of problem fields, tuning fields or backend."""
    backend = changes.pop("backend", PRODUCTION.backend)
    parts = {}
    for part in ("problem", "tuning"):
        fields = getattr(PRODUCTION, part)
        names = fields.values().keys() & changes.keys()
        parts[part] = dataclasses.replace(fields, **{name: changes.pop(name) for name in names})
    assert not changes
    return Variant(backend=backend, **parts)


def bucket(variant=PRODUCTION, **fields) -> Bucket:
    return Bucket(variant=variant, **{"row": 1, "line": 1, "section": OP, **fields})


def refused(call, *args, **kwargs) -> TableError:
    with pytest.raises(TableError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_symbol():
    assert PRODUCTION.symbol == "paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s64"
    raw = make(ape_in_state=False, requests_per_cta=4, store_bytes=256, min_ctas=2)
    assert raw.symbol == f"{OP}_hd512_r128_bf16_fp32_n4_raw_score_w8_s64_g4_b256_c2"
    small = make(compress_ratio=4, overlap=True, reduce_warps=1, head_slice=128, fused=True)
    assert small.symbol == f"{OP}_hd512_r4_overlap_bf16_fp32_n4_w1_s128_fused"
    assert make(min_ctas=6).symbol == "paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s64_c6"
    assert make(compress_ratio=4, overlap=True, backend="triton").symbol == (
        "paged_kv_compress_hd512_r4_overlap_bf16_fp32_n4_w8_s64_triton"
    )


def test_symbols_are_unique_c_identifiers():
    choices = {
        "head_dim": (64, 128, 512),
        "compress_ratio": (1, 4, 12, 128),
        "overlap": (False, True),
        "kv_dtype": ("bf16", "fp32"),
        "state_dtype": ("bf16", "fp32"),
        "next_n": (1, 2, 11),
        "ape_in_state": (True, False),
        "backend": ("cuda", "triton"),
        "reduce_warps": (1, 2, 16),
        "head_slice": (8, 32),
    }
    variants = [make(reduce_warps=1, min_ctas=ctas) for ctas in (2, 16, 32)] + [
        make(**dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]
    symbols = {variant.symbol for variant in variants}
    assert len(symbols) == len(variants) == len(set(variants))
    assert all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", symbol) for symbol in symbols)


def test_problem_and_tuning():
    assert PRODUCTION.op == OP
    assert PRODUCTION.spec is op_spec(OP)
    assert PRODUCTION.problem.values() == {
        "head_dim": 512,
        "compress_ratio": 128,
        "overlap": False,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
        "next_n": 4,
        "ape_in_state": True,
    }
    assert PRODUCTION.tuning.values() == {
        "reduce_warps": 8,
        "head_slice": 64,
        "fused": False,
        "requests_per_cta": 1,
        "deal": False,
        "store_bytes": 128,
        "min_ctas": 1,
    }


def test_a_problem_has_keyword_arguments_only():
    values = PRODUCTION.problem.values()
    with pytest.raises(TypeError, match="positional argument"):
        Problem(*values.values())
    assert Problem(**dict(reversed(values.items()))) == PRODUCTION.problem


def test_swapped_dtypes_are_another_problem():
    swapped = make(kv_dtype="fp32", state_dtype="bf16")
    assert swapped.problem != PRODUCTION.problem
    assert swapped != PRODUCTION
    assert swapped.symbol == "paged_kv_compress_hd512_r128_fp32_bf16_n4_w8_s64"
    assert len({bucket(one).group for one in (swapped, PRODUCTION)}) == 2


@pytest.mark.parametrize(
    ("changes", "vector", "lanes", "threads", "shared_bytes"),
    [
        ({}, 4, 16, 256, 128 * 64 * 8),  # the partials lie where the rows were
        ({"state_dtype": "bf16"}, 8, 8, 256, 12 * 8 * 64),  # four rows a thread: in registers
        ({"reduce_warps": 1}, 4, 16, 32, 2 * 16 * 64 * 8),  # a leaf of 16 rows per half warp
        ({"reduce_warps": 1, "overlap": True}, 4, 16, 32, 2 * 16 * 64 * 8),
        ({"head_slice": 4}, 4, 1, 256, 12 * 8 * 4),
        ({"head_slice": 256}, 4, 64, 512, 128 * 256 * 8),
        ({"head_slice": 512, "state_dtype": "bf16"}, 8, 64, 512, 128 * 512 * 4),
        ({"compress_ratio": 100}, 4, 16, 256, 128 * 64 * 8),
        ({"compress_ratio": 4, "overlap": True, "reduce_warps": 1}, 4, 16, 32, 0),
        (
            {"compress_ratio": 4, "overlap": True, "reduce_warps": 1, "head_slice": 128},
            4,
            32,
            32,
            8 * 128 * 8,
        ),
    ],
)
def test_threads_and_shared_memory(changes, vector, lanes, threads, shared_bytes):
    variant = make(**changes)
    shape = window_shape(variant.problem, variant.tuning)
    assert (shape.vector, shape.lanes) == (vector, lanes)
    assert variant.launch.threads == threads
    assert variant.launch.shared_bytes == shared_bytes


def test_a_triton_variant_has_the_threads_of_its_warps_and_no_shared_memory_of_ours():
    variant = make(head_slice=256, min_ctas=2, backend="triton")
    assert variant.launch == Launch(threads=256, min_ctas=2)


@pytest.mark.parametrize(
    ("changes", "items"),
    [
        ({}, 1),  # a row of 4 columns and ape takes 32 of the 128 bytes, and there are 4 rows
        ({"next_n": 2}, 2),
        ({"next_n": 1}, 4),
        ({"next_n": 1, "kv_dtype": "fp32"}, 128 // (4 * (2 * 4 + 4))),
        ({"next_n": 1, "state_dtype": "bf16"}, 128 // (8 * (2 * 2 + 4))),
        ({"next_n": 16}, 1),
        ({"next_n": 1, "min_ctas": 3}, 1),  # 85 registers per thread: too few
    ],
)
def test_items_that_a_storing_thread_has_at_once(changes, items):
    assert make(**changes).launch.constants["items_at_once"] == items


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"head_dim": 12}, "head_dim", "head_dim = 12 is not accepted; legal: 8 or more"),
        ({"next_n": 17}, "next_n", "14, 15, 16 (integer)"),
        ({"next_n": True}, "next_n", "next_n = true is not accepted"),
        ({"overlap": 1}, "overlap", "legal: false, true"),
        ({"kv_dtype": "fp16"}, "kv_dtype", 'kv_dtype = "fp16" is not accepted; legal: bf16, fp32'),
        ({"reduce_warps": 6}, "reduce_warps", "legal: 1, 2, 4, 8, 16, 32 (integer)"),
        ({"min_ctas": 33}, "min_ctas", "min_ctas = 33 is not accepted; legal: 1 to 32"),
        (
            {"min_ctas": 7},  # of 256 threads each
            "min_ctas",
            "is more CTAs of 256 threads than an SM takes; legal: 1, 2, 3, 4, 5, 6 (integer)",
        ),
        (
            {"head_slice": 48},
            "head_slice",
            "does not divide head_dim 512; legal: 4, 8, 16, 32, 64, 128, 256, 512 (integer)",
        ),
        (
            {"head_dim": 96, "head_slice": 48},
            "head_slice",
            "is not the width of a cuda CTA over fp32 state; legal: 4, 8, 16, 32 (integer)",
        ),
        (
            {"head_slice": 4, "state_dtype": "bf16"},
            "head_slice",
            "is not the width of a cuda CTA over bf16 state; legal: 8, 16, 32, 64, 128, 256, 512",
        ),
        (
            {"head_dim": 384, "head_slice": 384, "backend": "triton"},
            "head_slice",
            "is not the width of a triton CTA over fp32 state; legal: 4, 8, 16, 32, 64, 128 (int",
        ),
        (
            {"head_slice": 256, "reduce_warps": 32},
            "reduce_warps",
            "makes a CTA of 2048 threads, more than 1024; legal: 1, 2, 4, 8, 16 (integer)",
        ),
        (
            {"fused": True, "reduce_warps": 1, "head_slice": 128},
            "fused",
            "needs cuda, and one thread that holds all rows of a window; legal: false",
        ),
        (
            {"fused": True, "compress_ratio": 4, "overlap": True, "reduce_warps": 1},
            "fused",  # two threads share the rows of a slice of 64 columns
            "needs cuda, and one thread that holds all rows of a window; legal: false",
        ),
        (
            {"requests_per_cta": 4, "backend": "triton"},
            "requests_per_cta",
            "is for cuda kernels that are not fused; legal: 1",
        ),
        (
            {"deal": True, "requests_per_cta": 4},
            "deal",
            "is for cuda kernels that are not fused, with requests_per_cta 1; legal: false",
        ),
    ],
)
def test_refuses_what_cannot_run(changes, field, words):
    error = refused(make, **changes)
    assert error.field == field
    assert error.value == changes[field]
    assert words in str(error)


@pytest.mark.parametrize(
    ("arch", "kib"),
    [
        ("any", 99),
        ("sm_80", 163),
        ("sm_86", 99),
        ("sm_89", 99),
        ("sm_90", 227),
        ("sm_90a", 227),
        ("sm_100", 227),
        ("sm_100f", 227),
        ("sm_103a", 227),
        ("sm_120", 99),
        ("sm_121", 99),
        ("sm_150", 99),
    ],
)
def test_shared_memory_limit_of_arch(arch, kib):
    for needed in range(16, 257, 16):  # KiB; 128 columns of 16 rows take 16
        width = 8 * needed
        variant = make(head_dim=width, head_slice=width, compress_ratio=16, reduce_warps=1)
        assert variant.launch.shared_bytes == 1024 * needed
        if needed <= kib:
            assert bucket(variant, arch=arch).variant == variant
            continue
        error = refused(bucket, variant, arch=arch)
        assert (error.field, error.value) == ("head_slice", width)
        assert f"takes {1024 * needed} bytes" in str(error)
        assert f"arch {arch} has {1024 * kib}" in str(error)


def test_shared_memory_names_the_field_that_makes_it_smaller():
    wide = make(head_dim=2048, head_slice=2048, compress_ratio=16, reduce_warps=1)
    error = refused(wide.check_arch, "any")
    assert (error.field, error.value) == ("head_slice", 2048)
    assert error.legal == "a value that takes less"
    make(head_dim=2048, head_slice=512, compress_ratio=16, reduce_warps=1).check_arch("any")


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"min_size": 0}, "min_batch", "min_batch = 0 is not accepted; legal: 1 or more"),
        ({"max_size": True}, "max_batch", "max_batch = true is not accepted"),
        (
            {"min_size": 9, "max_size": 8},
            "max_batch",
            "max_batch = 8 is below min_batch 9: the row is never reached; legal: 9 or more",
        ),
        ({"arch": "sm90"}, "arch", 'arch = "sm90" is not accepted; legal: any, or sm_<number>'),
        ({"arch": 90}, "arch", "arch = 90 is not accepted"),
    ],
)
def test_bucket_refuses_what_is_never_reached(given, field, words):
    error = refused(bucket, **given)
    assert error.field == field
    assert words in str(error)


def test_bucket_names_its_group_and_row():
    own = bucket(arch="sm_90", row=3, line=14)
    assert own.group == Group(problem=PRODUCTION.problem, backend="cuda", arch="sm_90")
    assert str(own.group) == (
        "head_dim 512, compress_ratio 128, overlap false, kv_dtype bf16, state_dtype fp32,"
        " next_n 4, ape_in_state true, cuda, arch sm_90"
    )
    assert own.where == "paged_kv_compress row 3 (line 14)"
    assert bucket(row=2, line=9, section=f"tuned {OP}").where == f"tuned {OP} row 2 (line 9)"


def test_bucket_serves_its_range():
    bounded, open_ended = bucket(min_size=3, max_size=5), bucket(min_size=3)
    assert [size for size in range(1, 9) if bounded.serves(size)] == [3, 4, 5]
    assert [size for size in (2, 3, 10**9) if open_ended.serves(size)] == [3, 10**9]
    assert (bounded.range, open_ended.range) == ("3-5", "3+")
