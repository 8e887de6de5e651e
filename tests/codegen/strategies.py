"""Hypothesis strategies for tables, valid and with one fault, as rows of plain data.

The rules of a valid table are stated here a second time, from the design; nothing calls kvfold.
"""

import itertools
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

property_test = settings(max_examples=25, deadline=None)

OP = "paged_kv_compress"
FIRST_LINE = 3  # of the rows in text()
BYTES = {"bf16": 2, "fp32": 4}
SHARED_KIB = {"sm_80": 163, "sm_90a": 227, "sm_120": 99, "any": 99}
PROBLEM_FIELDS = (
    "head_dim", "compress_ratio", "overlap", "kv_dtype", "state_dtype", "next_n", "ape_in_state",
)  # fmt: skip
HAS_DEFAULT = ("overlap", "ape_in_state", "arch", "min_batch", "max_batch")


def text(rows: list) -> str:
    """A table file, one row per line. A row is a dict, or a string that stands as it is."""
    return "\n".join(["version: 1", f"{OP}:", *(f"  - {written(row)}" for row in rows), ""])


def written(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {written(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def places(row: dict) -> set[tuple]:
    """The (backend, arch, problem) that a row has a variant for; values of PROBLEM_FIELDS."""
    names = (
        "backend", "arch", "head_dim", "compress_ratio", "kv_dtype", "state_dtype", "next_n",
        "ape_in_state",
    )  # fmt: skip
    given = [({"arch": "any", "ape_in_state": True} | row)[name] for name in names]
    found = set()
    for values in itertools.product(*map(as_list, given)):
        backend, arch, head_dim, ratio, *others = values
        overlap = row.get("overlap", ratio == 4)
        found.add((backend, arch, (head_dim, ratio, overlap, *others)))
    return found


def batches(row: dict) -> tuple[int, float]:
    """The first and last batch size of a row."""
    return row.get("min_batch", 1), row.get("max_batch", float("inf"))


def runs(row: dict, warps: int, width: int) -> bool:
    """Whether this tuning can run at all of a row's places."""
    for backend, arch, (head_dim, ratio, overlap, _, state, *_) in places(row):
        vector = 16 // BYTES[state]
        lanes = width // vector
        if head_dim % width or width % vector:
            return False
        if backend == "triton":
            if width & (width - 1):
                return False
            continue
        threads = 32 * warps * max(1, lanes // 32)
        if (32 % lanes and lanes % 32) or threads > 1024:
            return False
        rows = 4
        while rows < ratio * (2 if overlap else 1):
            rows *= 2
        warp_rows = max(min(rows, 16), rows // warps)
        thread_rows = max(4, warp_rows * lanes // 32) if lanes < 32 else warp_rows
        held = 32 * min(thread_rows, 16) * threads if thread_rows > 4 else 0
        partials = 12 * warps * width if warps > 1 else 0
        if max(held, partials) > 1024 * SHARED_KIB[arch]:
            return False
    return True


def one_or_more(*values) -> st.SearchStrategy:
    """One of the values, or a list of some of them in any order."""
    one = st.sampled_from(values)
    return one | st.lists(one, min_size=1, unique=True)


FAMILIES = st.lists(
    st.fixed_dictionaries(
        {
            "head_dim": st.sampled_from([8, 24, 64, [128, 512], [96, 160], 640, 4096]),
            "compress_ratio": st.sampled_from([1, 4, 7, 128]),
            "overlap": st.booleans(),
            "backend": st.sampled_from(["cuda", "triton"]),
            "arch": st.sampled_from(["any", "sm_80", ["sm_90a", "sm_120"]]),
        }
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda family: str(sorted(family.items())),
)


@st.composite
def valid_rows(draw) -> list[dict]:
    """Families of problems that share none, each cut into rows that tile the batch axis."""
    rows = []
    for family in draw(FAMILIES):
        family |= {
            "kv_dtype": draw(one_or_more("bf16", "fp32")),
            "state_dtype": draw(one_or_more("bf16", "fp32")),
            "next_n": draw(one_or_more(1, 2, 3, 4, 16)),
            "ape_in_state": draw(one_or_more(True, False)),
        }
        widths = (4, 8, 16, 24, 32, 48, 64, 128, 160, 256, 512)
        tunings = [
            {"reduce_warps": warps, "head_slice": width}
            for warps in (1, 2, 4, 8, 16, 32)
            for width in widths
            if runs(family, warps, width)
        ]
        if draw(st.booleans()):  # say no more than needed
            if family["arch"] == "any":
                del family["arch"]
            if family["overlap"] == (family["compress_ratio"] == 4):
                del family["overlap"]
            if family["ape_in_state"] is True:
                del family["ape_in_state"]
        cuts = draw(st.lists(st.integers(1, 2000), max_size=3, unique=True).map(sorted))
        for below, upto in itertools.pairwise([0, *cuts, None]):
            row = family | draw(st.sampled_from(tunings))
            if below or draw(st.booleans()):
                row["min_batch"] = below + 1
            if upto:
                row["max_batch"] = upto
            rows.append(row)
    return draw(st.permutations(rows))


# ---- one fault -----------------------------------------------------------------------------------
# A fault edits the rows, at or near rows[at], and returns what the error must name: the index of a
# row and a field, each None where there is none to name.


class Fault(NamedTuple):
    rows: list
    row: int | None
    field: str | None
    kind: str


WRONG_TYPES = ["1.5", "null", "~", '""', "{a: 1}", "[[1]]", "2020-01-01", "!own 1", ".inf", "no"]
ILLEGAL = {
    "head_dim": ["0", "-8", "12", '"128"', "true", "0x80", "0200", "1_024", "9" * 30, "[a, 8]"],
    "compress_ratio": ["0", "-4", '"4"', "true", "2147483648", "[four, 4]"],
    "overlap": ["1", "0", '"true"', "yes", "maybe"],
    "kv_dtype": ["fp16", "float32", "BF16", "16", "true", "!own bf16", "[fp8, bf16]"],
    "state_dtype": ["fp16", "bfloat16", "!!binary bf16", "[16, fp32]"],
    "next_n": ["0", "17", "-1", '"1"', "true", "[17, 1]"],
    "ape_in_state": ["1", "0", '"true"', "yes", "[true, 1]"],
    "backend": ["hip", "CUDA", "true", "[metal, cuda]"],
    "reduce_warps": ["0", "3", "64", "-1", '"4"', "true"],
    "head_slice": ["0", "-32", "3", "7", "5000", '"64"', "true"],
    "arch": ["sm90", "sm_", "90", "any_", "sm_90aa", "true", "sm_\u0669", '"sm_90\\n"'],
    "min_batch": ["0", "-1", '"1"', "true", "[1]", "[]"],
    "max_batch": ["0", "-1", '"48"', "true", "[48, 49]", "[]", "null"],
}


def wrong_type(draw, rows, at):
    field = draw(st.sampled_from(sorted(rows[at])))
    rows[at][field] = draw(st.sampled_from(WRONG_TYPES))
    return at, field


def illegal_value(draw, rows, at):
    field = draw(st.sampled_from(sorted(ILLEGAL)))
    rows[at][field] = draw(st.sampled_from(ILLEGAL[field]))
    return at, field


def empty_list(draw, rows, at):
    field = draw(st.sampled_from(sorted(rows[at])))
    rows[at][field] = []
    return at, field


def repeated_value(draw, rows, at):
    field = draw(st.sampled_from(["head_dim", "kv_dtype", "next_n", "backend", "head_slice"]))
    values = as_list(rows[at][field])
    rows[at][field] = [*values, values[0]]
    return at, field


def unknown_field(draw, rows, at):
    field = draw(st.sampled_from(["head_slces", "warps", "stages", "max_bacth", "<<", "HEAD_DIM"]))
    rows[at][field] = 1
    return at, field


def missing_field(draw, rows, at):
    field = draw(st.sampled_from(sorted(set(rows[at]) - set(HAS_DEFAULT))))
    del rows[at][field]
    return at, field


def field_twice(draw, rows, at):
    field = draw(st.sampled_from(sorted(rows[at])))
    rows[at][f" {field}"] = rows[at][field]
    return at, field


def two_tunings(draw, rows, at):
    row = rows[at]
    fitting = [warps for warps in (1, 2, 4, 8, 16, 32) if runs(row, warps, row["head_slice"])]
    row["reduce_warps"] = fitting if len(fitting) > 1 else fitting * 2
    return at, "reduce_warps"


def duplicate_row(draw, rows, at):
    second = draw(st.integers(at + 1, len(rows)))
    rows.insert(second, dict(rows[at]))
    return second, "min_batch"


def never_reached(draw, rows, at):
    rows[at]["min_batch"] = rows[at].get("min_batch", 1) + 1
    rows[at]["max_batch"] = draw(st.integers(1, rows[at]["min_batch"] - 1))
    return at, "max_batch"


def neighbours(rows, at) -> list[int]:
    """The rows of rows[at]'s family by ascending batch; a family of one is first cut in two."""
    if batches(rows[at]) == (1, float("inf")):
        rows.append(rows[at] | {"min_batch": 21})
        rows[at]["max_batch"] = 20
    family = [i for i, row in enumerate(rows) if places(row) == places(rows[at])]
    return sorted(family, key=lambda i: batches(rows[i]))


def overlap(draw, rows, at):
    first, second = neighbours(rows, at)[:2]
    most = min(batches(rows[second])[1], 5000)
    rows[first]["max_batch"] = draw(st.integers(rows[second]["min_batch"], most))
    return second, "min_batch"


def gap(draw, rows, at):
    second = draw(st.sampled_from(neighbours(rows, at)[1:]))
    rows[second]["min_batch"] += 1
    first, last = batches(rows[second])
    return second, "min_batch" if first <= last else "max_batch"


def no_first_row(draw, rows, at):
    first, second, *_ = neighbours(rows, at)
    del rows[first]
    return second - (first < second), "min_batch"


def no_last_row(draw, rows, at):
    *_, second, last = neighbours(rows, at)
    del rows[last]
    return second - (last < second), "max_batch"


def not_a_mapping(draw, rows, at):
    rows[at] = draw(st.sampled_from(["", "5", "row", "[1, 2]"]))
    return at, None


def broken_yaml(draw, rows, at):
    row = written(rows[at])
    rows[at] = draw(
        st.sampled_from([row[:-1], "{" + row, row + "}", row + " x", row + ": [", "*row"])
    )
    return None, None


FAULTS = (
    wrong_type,
    illegal_value,
    empty_list,
    repeated_value,
    unknown_field,
    missing_field,
    field_twice,
    two_tunings,
    duplicate_row,
    never_reached,
    overlap,
    gap,
    no_first_row,
    no_last_row,
    not_a_mapping,
    broken_yaml,
)


@st.composite
def one_fault(draw, *kinds) -> Fault:
    """A valid table with one fault of one of the kinds, of any kind by default."""
    rows = [dict(row) for row in draw(valid_rows())]
    kind = draw(st.sampled_from(kinds or FAULTS))
    row, field = kind(draw, rows, draw(st.integers(0, len(rows) - 1)))
    return Fault(rows, row, field, kind.__name__)
