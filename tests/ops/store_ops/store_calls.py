"""Calls of the two store ops for tests, on guarded memory, and what two ops make of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numerics import assert_same_bits
from state_calls import GUARD, LAYOUTS, Guarded, guarded, make_arguments
from torch import Tensor

import kvfold
from kvfold.codegen import CacheFormat, PageLayout, Problem, TableError, Variant, op_spec
from kvfold.ops import row_reference
from kvfold.ops.norm_rope_store.spec import Arguments as NormArguments
from kvfold.ops.paged_kv_compress.spec import Arguments as DecodeStateArguments
from kvfold.ops.paged_kv_compress_store import spec as decode_spec
from kvfold.ops.prefill_compress.spec import Arguments as PrefillStateArguments
from kvfold.ops.prefill_compress_store import spec as prefill_spec
from kvfold.runtime.arguments import DTYPE_NAMES, DTYPES
from kvfold.runtime.dispatch import table
from kvfold.runtime.torch_op import torch_op

DECODE, PREFILL = OPS = ("paged_kv_compress_store", "prefill_compress_store")
STATE = ("paged_kv", "paged_score")
OUTPUTS = ("latent_out", "rows_out", "codes_out", "scales_out")
MUTATED = (*STATE, "cache", *OUTPUTS)
FLOATS = ("bf16", "fp32")
HEAD_DIMS = (128, 256, 512)
ROPE_DIMS = (0, 2, 32, 64, 128)
ROUNDINGS = ("once", "before_codes", "codes_from_bf16", "each_step")
WORK = ("all", "store", "reduce")
PREFETCH = ("none", "metadata", "state")
ALL_OUTPUTS = {"latent_out": "fp32", "rows_out": "bf16", "codes_out": "", "scales_out": ""}

StateArguments = DecodeStateArguments | PrefillStateArguments
StateOp = Callable[[StateArguments], None]
Store = Callable[["StoreCall", Tensor, Tensor], None]


class StoreCall(Guarded):
    """What the calls of both ops share. A subclass has the arguments of its op.

    Attributes:
        op: name of the op.
        state_op: name of the op that reduces its windows.
        state_arguments_type: the arguments of that op.
    """

    op: ClassVar[str]
    state_op: ClassVar[str]
    state_arguments_type: ClassVar[type]

    @property
    def problem(self) -> Problem:
        """What dispatch must find in the arguments."""
        fields = {
            "head_dim": self.head_dim,
            "compress_ratio": self.compress_ratio,
            "overlap": self.paged_kv.size(2) != self.head_dim,
            "kv_dtype": DTYPE_NAMES[self.kv_score.dtype],
            "state_dtype": DTYPE_NAMES[self.paged_kv.dtype],
            "ape_in_state": self.ape_in_state,
        }
        if self.op == DECODE:
            fields["next_n"] = self.next_n
        return op_spec(self.op).problem.of(fields)

    @property
    def head_dim(self) -> int:
        return self.weight.size(0)

    @property
    def num_rows(self) -> int:
        return self.positions.size(0)

    @property
    def output(self) -> Tensor:
        """Has an entry per row, as the output of a state op; Guarded.scrambled counts them."""
        return self.positions

    @property
    def layout(self) -> PageLayout:
        """Of a page of the cache."""
        rope_dim = 2 * self.rope_table.size(2)
        return table().formats[self.format].layout(self.head_dim, rope_dim, self.rows_per_page)

    def outside(self) -> list[Tensor]:
        """The bytes of every storage, with the written floating-point tensors zeroed."""
        copy = self.clone()
        for name in (*STATE, "latent_out", "rows_out"):
            if getattr(copy, name) is not None:
                getattr(copy, name).zero_()
        tensors = [x for x in copy.args() if isinstance(x, Tensor)]
        return [_bytes(x).cpu() for x in tensors]

    def scrambled(self, share: float, seed: int) -> Self:
        """As Guarded.scrambled, and the same share of slots and positions lies outside."""
        call = super().scrambled(share, seed)
        rng = np.random.default_rng(seed)
        max_pos, num_slots = len(call.rope_table), call.cache.size(0) * call.rows_per_page
        for tensor, outside in (
            (call.positions, outside_positions(max_pos)),
            (call.slots, outside_slots(num_slots)),
        ):
            nonsense = torch.from_numpy(rng.choice(outside, tensor.shape)).to(tensor)
            chosen = torch.from_numpy(rng.random(tensor.shape) < share)
            tensor.copy_(torch.where(chosen.to(tensor.device), nonsense, tensor))
        return call

    def filled(self) -> Tensor:
        """The rows that a window fills by the words of the contract, bool [num_rows] on the CPU."""
        found = torch.zeros(self.num_rows, dtype=torch.bool)
        if self.work == "store":
            return found
        cu_seq_lens, cu_outputs = self.cu_seq_lens.tolist(), self.cu_outputs.tolist()
        for b, length in enumerate(self.kv_lens.tolist()):
            begin, end = cu_seq_lens[b], cu_seq_lens[b + 1]
            if getattr(self, "new_tokens", None) is not None:
                end = begin + int(self.new_tokens[b])
            new, most = end - begin, min(length, getattr(self, "next_n", length))
            if begin < 0 or end > self.kv_score.size(0) or not 0 < new <= most:
                continue
            ratio = self.compress_ratio
            for c in range(length // ratio - (length - new) // ratio):
                row = cu_outputs[b] + c
                if 0 <= row < min(cu_outputs[b + 1], self.num_rows):
                    found[row] = True
        return found

    def stored(self) -> Tensor:
        """The rows that are stored, bool [num_rows] on the CPU."""
        positions, slots = self.positions.cpu(), self.slots.cpu()
        num_slots = self.cache.size(0) * self.rows_per_page
        inside = (positions >= 0) & (positions < len(self.rope_table))
        return self.filled() & inside & (slots >= 0) & (slots < num_slots)

    def state_arguments(self, output: Tensor) -> StateArguments:
        """The arguments of the op that reduces the windows."""
        fields = {
            one.name: getattr(self, one.name)
            for one in self.state_arguments_type.declared()
            if one.name != "output"
        }
        return self.state_arguments_type(**fields, output=output)

    def expected(self, state_op: StateOp, store: Store) -> Self:
        """A copy as the call must leave it: its windows are reduced, then its rows are stored.

        Args:
            state_op: runs the op that reduces the windows.
            store: takes the rows that a window fills to the cache: of (call, rows, filled).
        """
        done = self.clone()
        size, dtype = (self.num_rows, self.head_dim), DTYPES[self.row_dtype]
        rows = torch.full(size, torch.nan, dtype=dtype, device=self.weight.device)
        state_op(done.state_arguments(rows))
        done = done.clone("cpu")
        store(done, rows.cpu(), self.filled())
        return done


@dataclass(frozen=True)
class DecodeCall(StoreCall, decode_spec.Arguments):
    """The arguments of one call of paged_kv_compress_store."""

    op = DECODE
    state_op = "paged_kv_compress"
    state_arguments_type = DecodeStateArguments

    def without_last(self, tokens: Sequence[int]) -> DecodeCall:
        """The same call without the last tokens of each request, whose rows of kv_score stay."""
        less = torch.tensor(tokens, dtype=torch.int32, device=self.kv_lens.device)
        counts = guarded(self.cu_seq_lens.diff() - less, odd=True)
        return replace(self, kv_lens=guarded(self.kv_lens - less), new_tokens=counts)


@dataclass(frozen=True)
class PrefillCall(StoreCall, prefill_spec.Arguments):
    """The arguments of one call of prefill_compress_store."""

    op = PREFILL
    state_op = "prefill_compress"
    state_arguments_type = PrefillStateArguments


CALLS: dict[str, Any] = {DECODE: DecodeCall, PREFILL: PrefillCall}


def _bytes(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=x.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


def outside_positions(max_pos: int) -> np.ndarray:
    """Positions that rope_table does not have."""
    return np.array([-1, max_pos, max_pos + 1, -(2**31), 2**31 - 1], np.int32)


def outside_slots(num_slots: int) -> np.ndarray:
    """Slots that the cache does not have."""
    far = [-(2**63), -(2**32), 2**31, 2**32, 2**62, 2**63 - 1]
    return np.array([-1, -num_slots - 1, num_slots, num_slots + 1, *far], np.int64)


# ---- legal values --------------------------------------------------------------------------------


def fits(format: CacheFormat, head_dim: int, rope_dim: int) -> bool:
    """Whether the ops take rows of a format with so many columns, of which so many are rotated."""
    try:
        layout = format.layout(head_dim, rope_dim)
    except TableError:
        return False
    return layout.bf16_columns % (head_dim // 32) == 0


def ways(format: CacheFormat) -> list[tuple[str, bool]]:
    """The legal (rounding, rotate) of a format."""
    found = [(rounding, rotate) for rounding in ROUNDINGS for rotate in (False, True)]
    only_bf16 = "codes_from_bf16"
    found = [one for one in found if one[0] != only_bf16]
    return [*found, (only_bf16, False)] if format.rope == "bf16" else found


# ---- calls ---------------------------------------------------------------------------------------


def make(
    op: str, spans: Sequence[tuple[int, int]], *, device: str | torch.device = "cpu", **fields
) -> Any:
    """A well-formed call of an op on random data.

    Every row has a slot and a position of its own, also one that no window fills. Every storage
    begins and ends with guards, and the cache holds random bytes, so a wrong write shows.

    Args:
        op: one of OPS.
        spans: each request's (tokens before the call, new tokens).
        fields: as make_arguments and make_row_arguments take them, and scalars of the op. layout
            'strided' holds for all tensors. next_n is 8 by default, head_dim 128.
    """
    fields = {"head_dim": 128, "seed": 0, "layout": "split"} | fields
    state_names = inspect.signature(make_arguments).parameters
    row_names = inspect.signature(make_row_arguments).parameters
    arguments = make_arguments(spans, **{k: v for k, v in fields.items() if k in state_names})
    row_fields = {k: v for k, v in fields.items() if k in row_names}
    arguments |= make_row_arguments(
        len(arguments.pop("output")), strided=fields["layout"] == "strided", **row_fields
    )
    scalars = {k: v for k, v in fields.items() if k not in {*state_names, *row_names}}
    if op == DECODE:
        scalars = {"next_n": 8} | scalars
    return CALLS[op](**arguments, **scalars).clone(device)


def make_row_arguments(
    num_rows: int,
    *,
    head_dim: int,
    strided: bool = False,
    format: str = "fp8_528",
    rope_dim: int = 64,
    row_dtype: str = "bf16",
    weight_dtype: str = "bf16",
    eps: float = 1e-6,
    rounding: str = "once",
    rotate: bool = False,
    scale: float | None = None,
    outputs: Mapping[str, str] | Sequence[str] = (),
    rows_per_page: int = 4,
    more_pages: int = 1,
    padding: int = 0,
    skipped: float = 0.0,
    max_pos: int = 33,
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments of the way from a row to the cache, by name.

    Args:
        strided: tensors have gaps where they may, and nothing is aligned better than it must be.
        outputs: names of the optional outputs that the call has; a mapping names their dtypes.
        more_pages: pages in which no row has its slot.
        padding: bytes from the view of a page to the next page, a multiple of 4.
        skipped: about this share of the rows have a slot or a position outside.
    """
    rng = np.random.default_rng((seed, 1))
    layout = table().formats[format].layout(head_dim, rope_dim, rows_per_page)
    num_pages = -(-num_rows // rows_per_page) + more_pages
    dtypes = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, "bf16")

    def floats(*shape: int, dtype: str, offset: float = 0.0) -> Tensor:
        x = torch.from_numpy(offset + rng.standard_normal(shape)).to(DTYPES[dtype])
        return guarded(x, gap=16 // x.element_size() if strided else 0)

    def octets(number: int, width: int, stride: int, odd: int) -> Tensor:
        """Random bytes [number, width] with random bytes around them."""
        start = GUARD + odd * strided
        flat = rng.integers(0, 256, start + number * stride + GUARD).astype(np.uint8)
        return torch.from_numpy(flat).as_strided((number, width), (stride, 1), start)

    def output(name: str) -> Tensor | None:
        if name not in dtypes:
            return None
        if name in ("latent_out", "rows_out"):
            return floats(num_rows, head_dim, dtype=dtypes[name])
        width = layout.data_bytes if name == "codes_out" else layout.scale_bytes
        gap = 4 if name == "codes_out" else 3
        return octets(num_rows, width, max(width + gap * strided, 1), gap)

    angles = rng.uniform(-4, 4, (max_pos, rope_dim // 2))
    rope_table = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1)).float()
    positions = rng.integers(0, max_pos, num_rows).astype(np.int32)
    num_slots = num_pages * rows_per_page
    slots = rng.permutation(num_slots)[:num_rows]
    chosen = rng.random((2, num_rows)) < skipped / 2
    positions = np.where(chosen[0], rng.choice(outside_positions(max_pos), num_rows), positions)
    slots = np.where(chosen[1], rng.choice(outside_slots(num_slots), num_rows), slots)
    page_stride = -(-layout.page_bytes // 4) * 4 + padding
    return {
        "weight": floats(head_dim, dtype=weight_dtype, offset=1.0),
        "rope_table": guarded(rope_table, gap=strided * 3, odd=strided),
        "positions": guarded(torch.from_numpy(positions), odd=strided),
        "slots": guarded(torch.from_numpy(slots), odd=strided),
        "cache": octets(num_pages, layout.page_bytes, page_stride, 4),
        "eps": eps,
        "rows_per_page": rows_per_page,
        "format": format,
        "row_dtype": row_dtype,
        "rounding": rounding,
        "rotate": rotate,
        "scale": None if scale is None else guarded(torch.tensor([scale]), odd=strided),
        **{name: output(name) for name in OUTPUTS},
    }


def random_call(op: str, seed: int, **fixed) -> Any:
    """A well-formed call with every argument of `make` drawn at random, but for the fixed ones.

    It reserves rows for all windows that its tokens could close in one request.
    """
    rng = np.random.default_rng((seed, OPS.index(op)))

    def one_of(*values):
        return values[rng.integers(len(values))]

    drawn = {
        "compress_ratio": one_of(1, 2, 2, 4, 4, 4, 8, 128),
        "overlap": one_of(None, None, False, True),
        "kv_dtype": one_of(*FLOATS),
        "state_dtype": one_of(*FLOATS),
        "page_size": one_of(1, 3, 4, 7, 16, 32),
        "layout": one_of(*LAYOUTS),
        "ape_in_state": one_of(True, False),
        "work": one_of("all", "all", "all", *WORK),
        "prefetch": one_of(*PREFETCH),
        "format": one_of(*table().formats),
        "row_dtype": one_of(*FLOATS),
        "weight_dtype": one_of(*FLOATS),
        "eps": one_of(1e-6, 1e-5, 0.0, 0.5),
        "outputs": {name: one_of(*FLOATS) for name in OUTPUTS if rng.random() < 0.6},
        "rows_per_page": int(one_of(1, 2, 5, 64)),
        "more_pages": int(one_of(0, 1, 3)),
        "padding": int(one_of(0, 4, 16, 100)),
        "skipped": one_of(0.0, 0.4),
    }
    if op == DECODE:
        drawn["next_n"] = int(rng.integers(1, 9))
    else:
        drawn["write_state"] = one_of("all", "tail")
        drawn["max_rollback"] = one_of(0, 1, 3, 20)
        drawn["state_period"] = one_of(0, 1, 4, 6, 32)
    drawn |= fixed
    format = table().formats[drawn["format"]]
    shapes = [
        (head_dim, rope_dim)
        for head_dim in HEAD_DIMS
        for rope_dim in (*ROPE_DIMS, head_dim)
        if fits(format, head_dim, rope_dim) and head_dim == fixed.get("head_dim", head_dim)
    ]
    drawn["head_dim"], drawn["rope_dim"] = one_of(*shapes)
    drawn["rounding"], drawn["rotate"] = one_of(*ways(format))
    if format.scale == "tensor":
        drawn["scale"] = one_of(None, 1.0, 0.37, 1e-3)
    spans = _random_spans(rng, drawn["compress_ratio"], drawn.get("next_n"))
    most = -(-sum(new for _, new in spans) // drawn["compress_ratio"])
    call = make(op, spans, **{"seed": seed, "reserve": most + 1} | drawn | fixed)
    if op != DECODE or rng.integers(2):
        return call
    return call.without_last([int(rng.integers(new + 1)) for _, new in spans])


def _random_spans(
    rng: np.random.Generator, ratio: int, next_n: int | None
) -> list[tuple[int, int]]:
    spans = []
    for _ in range(rng.integers(1, 7)):
        if next_n is None:
            new = int(rng.integers((2, 6, min(4 * ratio, 150) + 2)[rng.integers(3)]))
        else:
            new = int(rng.integers(next_n + 1))
        # Half of the requests are about to close a window.
        near = max(0, ratio * int(rng.integers(1, 4)) - int(rng.integers(new + 1)))
        spans.append(((near, int(rng.integers(3 * ratio + 1)))[rng.integers(2)], new))
    return spans


def spans_for(op: str, ratio: int, next_n: int = 4) -> list[tuple[int, int]]:
    """Spans in which windows close with the first, a middle or the last new token, or not at all.

    One request is padding, some have no history; in a prefill some windows are of new tokens alone.
    """
    near = [(2 * ratio - late, next_n) for late in range(1, next_n + 1) if late <= 2 * ratio]
    spans = [*near, (0, next_n), (5, 0), (0, 0), (ratio, 1), (3 * ratio - 1, 1)]
    if op == PREFILL:
        spans += [(ratio // 2, 2 * ratio), (0, 3 * ratio + 1), (ratio - 1, ratio + 2)]
    return spans


# ---- runs ----------------------------------------------------------------------------------------


def run_op(call: StoreCall) -> None:
    """By the backend and the variant that dispatch chooses; on the CPU, the reference."""
    args, kwargs = call.args_and_kwargs()
    getattr(kvfold, call.op)(*args, **kwargs)


def run_by_dispatcher(call: StoreCall) -> None:
    args, kwargs = call.args_and_kwargs()
    getattr(torch.ops.kvfold, call.op)(*args, **kwargs)


def run_variant(variant: Variant, call: StoreCall) -> None:
    torch_op(call.op).run_variant(variant, *call.args())


def variant_of(call: StoreCall, backend: str, **tuning) -> Variant:
    fields = op_spec(call.op).tuning(**tuning)
    return Variant(problem=call.problem, backend=backend, tuning=fields)


def run_state_op(arguments: StateArguments) -> None:
    """As run_op, for the op that reduces the windows."""
    is_decode = isinstance(arguments, DecodeStateArguments)
    args, kwargs = arguments.args_and_kwargs()
    (kvfold.paged_kv_compress if is_decode else kvfold.prefill_compress)(*args, **kwargs)


def store_by_op(call: StoreCall, rows: Tensor, filled: Tensor) -> None:
    """Stores rows by norm_rope_store. The others' slots are -1."""
    names = {one.name for one in NormArguments.declared()} - {"rows", "slots"}
    fields = {name: getattr(call, name) for name in names}
    slots = torch.where(filled, call.slots, -1)
    args, kwargs = NormArguments(rows=rows, slots=slots, **fields).args_and_kwargs()
    kvfold.norm_rope_store(*args, **kwargs)


def by_two_ops(call: StoreCall) -> Any:
    """A copy on the CPU, as the state op, by run_op, and the reference of the rows leave it."""
    return call.expected(run_state_op, row_reference.store)


def by_variant(variant: Variant, call: StoreCall) -> Any:
    """The same by a variant of the state op with the tuning of one of the store op."""
    spec = op_spec(call.state_op)
    plain = Variant(
        problem=spec.problem(**variant.problem.values()),
        backend=variant.backend,
        tuning=variant.tuning,
    )

    def run(arguments: StateArguments) -> None:
        torch_op(call.state_op).run_variant(plain, *arguments.args())

    return call.expected(run, row_reference.store)


def assert_is(call: StoreCall, expected: StoreCall, what: str = "") -> None:
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


def assert_stores(
    run: Callable[[Any], None], call: StoreCall, expected: StoreCall, what: str = ""
) -> None:
    """Runs a copy of the call and compares all of its memory with the expected call's."""
    mine = call.clone()
    run(mine)
    assert_is(mine, expected, what)


def with_scalars(call: StoreCall, **scalars) -> Any:
    """The same call on memory of its own, with other scalars."""
    return replace(call.clone(), **scalars)
