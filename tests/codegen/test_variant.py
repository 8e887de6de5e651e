import dataclasses
import itertools
import pickle
import re

import pytest

from kvfold.codegen import Bucket, TableError, Variant

PRODUCTION = Variant(
    op="paged_kv_compress",
    head_dim=512,
    compress_ratio=128,
    overlap=False,
    kv_dtype="bf16",
    state_dtype="fp32",
    next_n=4,
    backend="cuda",
    reduce_warps=8,
    head_slice=64,
)


def make(**changes) -> Variant:
    return dataclasses.replace(PRODUCTION, **changes)


def refused(call, *args, **kwargs) -> TableError:
    with pytest.raises(TableError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_symbol():
    assert PRODUCTION.symbol == "paged_kv_compress_hd512_r128_bf16_fp32_n4_w8_s64"
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


def test_key_problem_tuning():
    assert PRODUCTION.key == (512, 128, False, "bf16", "fp32", 4)
    assert PRODUCTION.problem == {
        "head_dim": 512,
        "compress_ratio": 128,
        "overlap": False,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
        "next_n": 4,
    }
    assert PRODUCTION.tuning == {
        "backend": "cuda",
        "schedule": "direct",
        "reduce_warps": 8,
        "head_slice": 64,
        "min_ctas": 1,
    }


@pytest.mark.parametrize(
    ("changes", "vector", "slices", "threads", "shared_bytes"),
    [
        ({}, 4, 8, 256, 128 * 64 * 8),  # the partials lie where the rows were
        ({"state_dtype": "bf16"}, 8, 8, 256, 12 * 8 * 64),  # four rows a thread: in registers
        # ... and fetched ahead: rows, two sets of new rows, two of partials, the list and its bits.
        (
            {"state_dtype": "bf16", "schedule": "persistent"},
            8,
            8,
            256,
            256 * 4 * 2 * 16 + 2 * 4 * 64 * (2 + 2 + 4) + 2 * 12 * 8 * 64 + 2 * 480 + 480 // 8,
        ),
        ({"reduce_warps": 1}, 4, 8, 32, 2 * 16 * 64 * 8),  # a leaf of 16 rows per half warp
        ({"reduce_warps": 1, "overlap": True}, 4, 8, 32, 2 * 16 * 64 * 8),
        ({"head_slice": 4}, 4, 128, 256, 12 * 8 * 4),
        ({"head_slice": 256}, 4, 2, 512, 128 * 256 * 8),
        ({"head_slice": 512, "state_dtype": "bf16"}, 8, 1, 512, 128 * 512 * 4),
        ({"compress_ratio": 100}, 4, 8, 256, 128 * 64 * 8),
        ({"head_slice": 256, "backend": "triton"}, 4, 2, 256, 0),
    ],
)
def test_derived(changes, vector, slices, threads, shared_bytes):
    variant = make(**changes)
    assert variant.vector == vector
    assert variant.slices == slices
    assert variant.threads == threads
    assert variant.shared_bytes == shared_bytes


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"head_dim": 12}, "head_dim", "head_dim = 12 is not accepted; legal: 8, 16, ..."),
        ({"next_n": 17}, "next_n", "14, 15, 16 (integer)"),
        ({"next_n": True}, "next_n", "next_n = true is not accepted"),
        ({"overlap": 1}, "overlap", "legal: false, true"),
        ({"kv_dtype": "fp16"}, "kv_dtype", 'kv_dtype = "fp16" is not accepted; legal: bf16, fp32'),
        ({"reduce_warps": 6}, "reduce_warps", "legal: 1, 2, 4, 8, 16, 32 (integer)"),
        (
            {"schedule": "persistent", "backend": "triton"},
            "schedule",
            "legal: direct",
        ),
        (
            {"schedule": "persistent", "reduce_warps": 1},  # 64 rows to a thread
            "reduce_warps",
            "legal: 4, 8, 16, 32 (integer)",
        ),
        (
            {"schedule": "persistent", "compress_ratio": 4096, "reduce_warps": 8},
            "reduce_warps",
            "legal: none",
        ),
        ({"min_ctas": 33}, "min_ctas", "min_ctas = 33 is not accepted; legal: 1, 2, ..., 32"),
        (
            {"min_ctas": 7},  # of 256 threads each
            "min_ctas",
            "is more than an SM takes of CTAs of 256 threads; legal: 1, 2, 3, 4, 5, 6 (int",
        ),
        (
            {"head_slice": 48},
            "head_slice",
            "does not divide head_dim 512; legal: 4, 8, 16, 32, 64, 128, 256, 512 (integer)",
        ),
        (
            {"head_dim": 96, "head_slice": 48},
            "head_slice",
            "is no width of a cuda CTA over fp32 state; legal: 4, 8, 16, 32 (integer)",
        ),
        (
            {"head_slice": 4, "state_dtype": "bf16"},
            "head_slice",
            "is no width of a cuda CTA over bf16 state; legal: 8, 16, 32, 64, 128, 256, 512",
        ),
        (
            {"head_dim": 384, "head_slice": 384, "backend": "triton"},
            "head_slice",
            "is no width of a triton CTA over fp32 state; legal: 4, 8, 16, 32, 64, 128 (integer)",
        ),
        (
            {"head_slice": 256, "reduce_warps": 32},
            "reduce_warps",
            "makes a CTA of 2048 threads, more than 1024; legal: 1, 2, 4, 8, 16 (integer)",
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
        assert variant.shared_bytes == 1024 * needed
        if needed <= kib:
            Bucket(variant=variant, arch=arch, row=1, line=1)
            continue
        error = refused(Bucket, variant=variant, arch=arch, row=1, line=1)
        assert (error.field, error.value) == ("head_slice", width)
        assert f"takes {1024 * needed} bytes" in str(error)
        assert f"arch {arch} has {1024 * kib}" in str(error)


def test_shared_memory_names_the_slices_that_fit():
    error = refused(
        make(head_dim=2048, head_slice=2048, compress_ratio=16, reduce_warps=1).check_shared, "any"
    )
    assert error.legal == "4, 8, 16, 32, 64, 128, 256, 512 (integer)"
    for width in map(int, error.legal.removesuffix(" (integer)").split(", ")):
        make(head_dim=2048, head_slice=width, compress_ratio=16, reduce_warps=1).check_shared("any")


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"min_batch": 0}, "min_batch", "min_batch = 0 is not accepted; legal: 1, 2, ..."),
        ({"max_batch": True}, "max_batch", "max_batch = true is not accepted"),
        (
            {"min_batch": 9, "max_batch": 8},
            "max_batch",
            "max_batch = 8 is below min_batch 9: the row is never reached; legal: 9 or more",
        ),
        ({"arch": "sm90"}, "arch", 'arch = "sm90" is not accepted; legal: any, or sm_<number>'),
        ({"arch": 90}, "arch", "arch = 90 is not accepted"),
    ],
)
def test_bucket_refuses_what_is_never_reached(given, field, words):
    error = refused(Bucket, variant=PRODUCTION, row=1, line=1, **given)
    assert error.field == field
    assert words in str(error)


def test_bucket_names_its_group_and_row():
    bucket = Bucket(variant=PRODUCTION, arch="sm_90", row=3, line=14)
    assert bucket.group == (
        "paged_kv_compress",
        "cuda",
        "sm_90",
        512,
        128,
        False,
        "bf16",
        "fp32",
        4,
    )
    assert bucket.where == "paged_kv_compress row 3 (line 14)"


def test_error_says_all_it_knows_and_pickles():
    error = TableError("is bad", file="t.yaml", row="r", field="next_n", value=[1, "x"], legal="1")
    assert str(error) == 't.yaml: r: next_n = [1, "x"] is bad; legal: 1'
    assert str(TableError("is bad")) == "is bad"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))
