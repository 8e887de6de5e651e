"""Calls of norm_rope_store for tests, on guarded memory, and what the op makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import row_oracle
import torch
from numerics import assert_same_bits
from state_calls import GUARD, Guarded, guarded
from torch import Tensor

import kvfold
from kvfold.codegen import CacheFormat, Variant
from kvfold.ops.norm_rope_store.spec import Arguments, Problem, Tuning
from kvfold.runtime.arguments import DTYPE_NAMES, DTYPES
from kvfold.runtime.dispatch import table
from kvfold.runtime.torch_op import torch_op

MUTATED = tuple(one.name for one in Arguments.declared_tensors() if one.mutated)
HEAD_DIMS = (128, 256, 512)
FLOATS = ("bf16", "fp32")
ROPE_LAYOUTS = ("halves", "interleaved", "transposed")
OUTPUTS = ("latent_out", "rows_out", "codes_out", "scales_out")
INT32_ENDS = [-(2**31), -(2**31) + 1, 2**31 - 1]
INT64_ENDS = [-(2**63), -(2**32), -(2**31), 2**31, 2**32, 2**62, 2**63 - 1]
SPECIAL = np.array(
    [0, 1, 2, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000],
    np.uint32,
)

Run = Callable[["Call"], None]


@dataclass(frozen=True)
class Call(Guarded, Arguments):
    """The arguments of one call."""

    @property
    def problem(self) -> Problem:
        """What dispatch must find in the arguments."""
        return Problem(head_dim=self.rows.size(1), rows_dtype=DTYPE_NAMES[self.rows.dtype])

    @property
    def rope_dim(self) -> int:
        return 2 * self.rope_table.size(2)

    @property
    def cache_format(self) -> CacheFormat:
        """The format of the table in force."""
        return table().formats[self.format]

    def outside(self) -> list[Tensor]:
        """The bytes of every storage, with the written floating-point tensors zeroed."""
        copy = self.clone()
        for name in ("latent_out", "rows_out"):
            if getattr(copy, name) is not None:
                getattr(copy, name).zero_()
        tensors = [x for x in copy.args() if isinstance(x, Tensor)]
        return [_bytes(x).cpu() for x in tensors]

    def expected(self) -> Call:
        """A copy as the call must leave it, on the CPU."""
        done = self.clone("cpu")
        stored = row_oracle.store(
            done.rows.float().numpy(),
            done.weight.float().numpy(),
            done.rope_table.numpy(),
            done.positions.numpy(),
            done.slots.numpy(),
            done.cache.numpy(),
            self.eps,
            self.rows_per_page,
            self.cache_format,
            rounding=self.rounding,
            rotate=self.rotate,
            scale=None if done.scale is None else done.scale.item(),
        )
        which = torch.from_numpy(stored.which)
        for output, values in (
            (done.latent_out, stored.stages.latent),
            (done.rows_out, stored.stages.rows),
        ):
            if output is not None:
                values = row_oracle.bf16(values) if output.dtype == torch.bfloat16 else values
                output[which] = torch.from_numpy(values).to(output.dtype)
        for output, data in ((done.codes_out, stored.codes), (done.scales_out, stored.scales)):
            if output is not None:
                output[which] = torch.from_numpy(data)
        return done

    def taken(self, which: Sequence[int]) -> Call:
        """A call with these rows only, on memory of its own."""
        call = self.clone()
        at = torch.tensor(which, dtype=torch.int64, device=self.rows.device)
        chosen = {
            name: getattr(call, name)[at]
            for name in ("rows", "positions", "slots", *OUTPUTS)
            if getattr(call, name) is not None
        }
        return replace(call, **chosen)


def _bytes(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=x.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


# ---- legal values --------------------------------------------------------------------------------


def fits(format: CacheFormat, head_dim: int, rope_dim: int) -> bool:
    """Whether the op takes rows of a format with so many columns, of which so many are rotated."""
    plain = rope_dim if format.rope == "bf16" else 0
    columns = head_dim - plain
    if rope_dim > head_dim or columns <= 0 or plain % (head_dim // 32):
        return False
    if format.block and columns % format.block:
        return False
    data, scales = row_oracle.row_bytes(format, head_dim, rope_dim)
    if format.block and scales < columns // format.block * row_oracle.SCALE_BYTES[format.scale]:
        return False
    return (data + scales * (format.placement == "after_row")) % 4 == 0


def ways(format: CacheFormat) -> Iterator[tuple[str, bool]]:
    """The legal (rounding, rotate) of a format."""
    for rounding in row_oracle.ROUNDINGS:
        if rounding != "codes_from_bf16":
            yield rounding, False
            yield rounding, True
        elif format.rope == "bf16":
            yield rounding, False


# ---- values --------------------------------------------------------------------------------------


def random_rows(rng: np.random.Generator, num_rows: int, head_dim: int) -> np.ndarray:
    """Rows of several magnitudes; about one in eight has columns of many magnitudes."""
    magnitude = np.exp2(rng.integers(-12, 12, (num_rows, 1)))
    wide = np.exp2(rng.integers(-20, 1, (num_rows, head_dim)))
    spread = np.where(rng.random((num_rows, 1)) < 0.125, wide, 1)
    values = rng.standard_normal((num_rows, head_dim))
    return (values * magnitude * spread).astype(np.float32)


def every_bf16(head_dim: int) -> np.ndarray:
    """All 65,536 bf16 patterns in order, so that the values of a row are of like magnitude."""
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).reshape(-1, head_dim)


def special_rows(rng: np.random.Generator, head_dim: int) -> np.ndarray:
    """Zeros of both signs, denormals, infinities, NaN, the largest values, arbitrary bits."""
    some = np.concatenate([SPECIAL, SPECIAL | 0x80000000])
    alone = np.tile(some[:, None], head_dim)
    few = rng.standard_normal((24, head_dim)).astype(np.float32).view(np.uint32)
    few = np.where(rng.random(few.shape) < 1.5 / head_dim, rng.choice(some, few.shape), few)
    signs = rng.choice(np.array([0, 0x80000000], np.uint32), (16, head_dim))
    denormals = rng.integers(0, 1 << rng.integers(1, 24, (16, 1)), (16, head_dim)) | signs
    sparse = np.where(rng.random((8, head_dim)) < 2 / head_dim, rng.choice(some, (8, head_dim)), 0)
    bits = rng.integers(0, 1 << 32, (8, head_dim))
    parts = [alone, few, signs[:4], denormals, sparse, bits]
    return np.concatenate(parts).astype(np.uint32).view(np.float32)


# ---- calls ---------------------------------------------------------------------------------------


def make(
    *,
    format: str = "mixed_584",
    head_dim: int = 512,
    rope_dim: int = 64,
    num_rows: int = 7,
    values: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    rope_table: np.ndarray | None = None,
    rows_dtype: str = "bf16",
    weight_dtype: str = "bf16",
    eps: float = 1e-6,
    rounding: str = "once",
    rotate: bool = False,
    prefetch: str = "none",
    scale: float | None = None,
    outputs: Mapping[str, str] | Sequence[str] = (),
    rope_layout: str = "halves",
    rows_per_page: int = 4,
    more_pages: int = 1,
    more_bytes: int = 0,
    padding: int = 0,
    skipped: float = 0.0,
    strided: bool = False,
    max_pos: int = 33,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Call:
    """A well-formed call. Every storage begins and ends with guards, and the cache holds random
    bytes, so a wrong write shows.

    Args:
        values: the rows, float32; random ones by default. weight and rope_table, [max_pos, 2,
            pairs], likewise.
        outputs: names of the optional outputs that the call has; a mapping names their dtypes.
        rope_layout: the memory that rope_table is a view of. 'halves' has cosines and sines side by
            side, 'interleaved' in turn; 'transposed' has a position per column.
        more_pages: pages in which no row is stored.
        more_bytes: bytes of a page beyond what it needs, which the view of the cache has.
        padding: bytes from the view of a page to the next page, or a few more: a page begins at a
            multiple of 4.
        skipped: about this share of the rows have a slot or a position outside.
        strided: rows and optional outputs have gaps, and nothing is aligned better than it must be.
    """
    rng = np.random.default_rng(seed)
    cache_format = table().formats[format]
    if values is None:
        values = random_rows(rng, num_rows, head_dim)
    num_rows = len(values)
    if weight is None:
        weight = (1 + rng.standard_normal(head_dim) / 4).astype(np.float32)
    if rope_table is None:
        angles = rng.uniform(-4, 4, (max_pos, rope_dim // 2))
        rope_table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    num_pages = -(-num_rows // rows_per_page) + more_pages
    positions, slots = _indices(rng, num_rows, len(rope_table), num_pages * rows_per_page, skipped)
    page_bytes = more_bytes + row_oracle.page_bytes(cache_format, head_dim, rope_dim, rows_per_page)
    data_bytes, scale_bytes = row_oracle.row_bytes(cache_format, head_dim, rope_dim)
    dtypes = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, "bf16")

    def floats(x: np.ndarray, dtype: str) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[dtype])
        return guarded(x, gap=16 // x.element_size() if strided else 0)

    def output(name: str) -> Tensor | None:
        if name not in dtypes:
            return None
        if name in ("latent_out", "rows_out"):
            return floats(rng.standard_normal((num_rows, head_dim)), dtypes[name])
        width = data_bytes if name == "codes_out" else scale_bytes
        gap = (4 if name == "codes_out" else 3) * strided
        return _random_bytes(rng, num_rows, width, max(width + gap, 1), GUARD + gap)

    call = Call(
        rows=floats(values, rows_dtype),
        weight=floats(weight, weight_dtype),
        rope_table=_rope_view(rope_table, rope_layout, strided),
        positions=guarded(torch.from_numpy(positions), odd=strided),
        slots=guarded(torch.from_numpy(slots), odd=strided),
        cache=_random_bytes(
            rng, num_pages, page_bytes, -(-page_bytes // 4) * 4 + padding, GUARD + 4 * strided
        ),
        eps=eps,
        rows_per_page=rows_per_page,
        format=format,
        rounding=rounding,
        rotate=rotate,
        prefetch=prefetch,
        scale=None if scale is None else guarded(torch.tensor([scale]), odd=strided),
        **{name: output(name) for name in OUTPUTS},
    )
    return call.clone(device)


def _indices(
    rng: np.random.Generator, num_rows: int, max_pos: int, num_slots: int, skipped: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and slots; no two rows have one slot."""
    positions = rng.integers(0, max(max_pos, 1), num_rows)
    slots = rng.permutation(num_slots)[:num_rows]
    outside = [-1, max_pos, max_pos + 1, *INT32_ENDS]
    chosen = rng.random((2, num_rows)) < skipped / 2
    positions = np.where(chosen[0], rng.choice(outside, num_rows), positions)
    outside = [-1, -num_slots, num_slots, num_slots + 1, *INT64_ENDS]
    slots = np.where(chosen[1], rng.choice(np.array(outside, np.int64), num_rows), slots)
    return positions.astype(np.int32), slots.astype(np.int64)


def _rope_view(values: np.ndarray, layout: str, odd: bool) -> Tensor:
    """The [max_pos, 2, pairs] view of a guarded table in some layout."""
    order = {"halves": (0, 1, 2), "interleaved": (0, 2, 1), "transposed": (1, 2, 0)}[layout]
    memory = guarded(torch.from_numpy(np.ascontiguousarray(values.transpose(order))), odd=odd)
    return memory.permute(*np.argsort(order).tolist())


def _random_bytes(
    rng: np.random.Generator, number: int, width: int, stride: int, start: int
) -> Tensor:
    """Random bytes [number, width] with random bytes around them."""
    flat = rng.integers(0, 256, start + number * stride + GUARD).astype(np.uint8)
    return torch.from_numpy(flat).as_strided((number, width), (stride, 1), start)


def random_call(seed: int, **fixed) -> Call:
    """A well-formed call with every argument of `make` drawn at random, but for the fixed ones."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    drawn = {"format": one_of(*table().formats)} | fixed
    format = table().formats[drawn["format"]]
    shapes = [
        (head_dim, rope_dim)
        for head_dim in HEAD_DIMS
        for rope_dim in (0, 2, 32, 64, 126, 128, 256, 512)
        if fits(format, head_dim, rope_dim)
        and head_dim == fixed.get("head_dim", head_dim)
        and rope_dim == fixed.get("rope_dim", rope_dim)
    ]
    drawn["head_dim"], drawn["rope_dim"] = one_of(*shapes)
    drawn["rounding"], drawn["rotate"] = one_of(*ways(format))
    if format.scale == "tensor":
        drawn["scale"] = one_of(None, 1.0, 0.37, 1e-3)
    drawn |= {
        "num_rows": int(one_of(1, 2, 5, 17)),
        "rows_dtype": one_of(*FLOATS),
        "weight_dtype": one_of(*FLOATS),
        "eps": one_of(1e-6, 1e-5, 0.0, 0.5),
        "outputs": {name: one_of(*FLOATS) for name in OUTPUTS if rng.random() < 0.6},
        "rope_layout": one_of(*ROPE_LAYOUTS),
        "rows_per_page": int(one_of(1, 2, 5, 64)),
        "more_pages": int(one_of(0, 1, 3)),
        "more_bytes": int(one_of(0, 0, 1, 16)),
        "padding": int(one_of(0, 4, 16, 100)),
        "skipped": one_of(0.0, 0.4),
        "strided": one_of(False, True),
    }
    return make(**{"seed": seed} | drawn | fixed)


# ---- runs ----------------------------------------------------------------------------------------


def run_op(call: Call) -> None:
    """By the backend and the variant that dispatch chooses; on the CPU, the reference."""
    args, kwargs = call.args_and_kwargs()
    kvfold.norm_rope_store(*args, **kwargs)


def run_by_dispatcher(call: Call) -> None:
    args, kwargs = call.args_and_kwargs()
    torch.ops.kvfold.norm_rope_store(*args, **kwargs)


def variant_of(call: Call, backend: str, warps: int) -> Variant:
    return Variant(problem=call.problem, backend=backend, tuning=Tuning(warps=warps))


def run_variant(variant: Variant, call: Call) -> None:
    torch_op("norm_rope_store").run_variant(variant, *call.args())


def assert_is(call: Call, expected: Call, what: str = "") -> None:
    """A call's tensors hold what another one's hold, and so do their guards and gaps."""
    for name in MUTATED:
        mine, wanted = getattr(call, name), getattr(expected, name)
        if mine is None:
            assert wanted is None
        elif mine.is_floating_point():
            assert_same_bits(mine, wanted, f"{what} {name}")
        else:
            _assert_same_bytes(mine.cpu(), wanted.cpu(), f"{what} {name}")
    for mine, wanted in zip(call.outside(), expected.outside(), strict=True):
        assert torch.equal(mine, wanted), f"{what}: bytes outside the outputs changed"


def _assert_same_bytes(mine: Tensor, wanted: Tensor, what: str) -> None:
    assert mine.shape == wanted.shape, what
    differing = (mine != wanted).nonzero().tolist()
    if differing:
        row, byte = differing[0]
        raise AssertionError(
            f"{what}: {len(differing)} bytes differ; [{row}, {byte}] is {int(mine[row, byte]):#04x}"
            f", not {int(wanted[row, byte]):#04x}"
        )


def assert_stores(run: Run, call: Call, expected: Call | None = None, what: str = "") -> None:
    """Runs a copy of the call and compares all of its memory with what the oracle says."""
    mine = call.clone()
    run(mine)
    assert_is(mine, call.expected() if expected is None else expected, what)
