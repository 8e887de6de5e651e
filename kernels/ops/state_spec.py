"""What the declarations of the state ops share: problem fields, arguments and their check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvfold import codegen
from kvfold.codegen import dtype, flag, integer, scalar, tensor
from kvfold.codegen.fields import POSITIVE
from kvfold.device.window_shape import WindowShape

if TYPE_CHECKING:
    from torch import Tensor

WARPS = (1, 2, 4, 8, 16, 32)  # that may share the rows of a window

# The members of the CUDA parameter struct that every state op begins with.
PARAMS = (
    "batch",
    "num_tokens",
    "num_outputs",
    "num_pages",
    "max_pages",
    "page_size",
    "uint32 page_multiplier",
    "page_shift",
    "prefetch",
    "stores",
    "reduces",
)


@dataclass(frozen=True, kw_only=True)
class StateProblem(codegen.Problem):
    """The problem fields of a state op. An op may add its own; ape_in_state comes last."""

    head_dim: int = integer(
        range(8, 2**30, 8), symbol="hd{}", help="columns of a compressed row, a multiple of 8"
    )
    compress_ratio: int = integer(POSITIVE, symbol="r{}", help="tokens per window")
    overlap: bool = flag(
        symbol="overlap",
        default=lambda problem: problem["compress_ratio"] == 4,
        help="whether a window also has the rows of the window before it; state_dim is then"
        " 2*head_dim; default: true for compress_ratio 4, false for every other",
    )
    kv_dtype: str = dtype("bf16", "fp32", help="dtype of kv_score; output may have either")
    state_dtype: str = dtype("bf16", "fp32", help="dtype of paged_kv and paged_score")


def ape_in_state_field() -> Any:
    """The problem field ape_in_state."""
    return flag(
        default=True,
        symbol="raw_score",
        symbol_for=False,
        help="whether the score state holds score + ape, or the raw score",
    )


# An op's Arguments inherits from these classes; the last one named comes first in its order.


@dataclass(frozen=True)
class StateTensors(codegen.Arguments):
    """New tokens, the state and its block tables."""

    kv_score: Tensor = tensor(
        "num_tokens, 2*state_dim", "bf16, fp32", help="new tokens: KV, then score"
    )
    ape: Tensor = tensor(
        "compress_ratio, state_dim",
        "fp32",
        help="absolute position embedding, added to the score; row = position % compress_ratio",
    )
    paged_kv: Tensor = tensor(
        "num_pages, page_size, state_dim",
        "bf16, fp32",
        mutated=True,
        strides="paged_kv_page_stride, paged_kv_slot_stride",
        help="KV state",
    )
    paged_score: Tensor = tensor(
        "num_pages, page_size, state_dim",
        "bf16, fp32",
        like="paged_kv",
        mutated=True,
        strides="paged_score_page_stride, paged_score_slot_stride",
        help="score state",
    )
    block_table_kv: Tensor = tensor(
        "batch, max_pages", "int32", help="logical page -> physical page of paged_kv"
    )
    block_table_score: Tensor = tensor(
        "batch, max_pages", "int32", help="logical page -> physical page of paged_score"
    )


@dataclass(frozen=True)
class OutputTensor(codegen.Arguments):
    """Where the compressed rows go, if not to the cache."""

    output: Tensor = tensor(
        "num_outputs, head_dim", "bf16, fp32", mutated=True, help="compressed rows"
    )


@dataclass(frozen=True)
class MetadataTensors(codegen.Arguments):
    """The requests of a call."""

    kv_lens: Tensor = tensor("batch", "int32", help="tokens per request after this call")
    cu_seq_lens: Tensor = tensor(
        "batch+1", "int32", help="prefix sums of the new tokens per request"
    )
    cu_outputs: Tensor = tensor(
        "batch+1", "int32", help="prefix sums of the output rows reserved per request"
    )


@dataclass(frozen=True)
class NewTokensTensor(codegen.Arguments):
    """The new tokens of each request, for a call whose cu_seq_lens do not say them."""

    new_tokens: Tensor | None = tensor(
        "batch",
        "int32",
        optional=True,
        help="new tokens per request, the first from row cu_seq_lens[b] on; None: all rows up to"
        " cu_seq_lens[b + 1]",
    )


@dataclass(frozen=True)
class RatioScalar(codegen.Arguments):
    """The first scalar."""

    compress_ratio: int = scalar(int, help="tokens per window")


@dataclass(frozen=True)
class StateArguments(RatioScalar, MetadataTensors, OutputTensor, StateTensors):
    """The arguments that a state op with an output begins with."""


@dataclass(frozen=True)
class StateKeywords(codegen.Arguments):
    """The scalars that every state op takes by name."""

    prefetch: str = scalar(
        str,
        default="none",
        choices=("none", "metadata", "state"),
        keyword=True,
        help="what may be read while the kernel before this one still runs: nothing; the integer"
        " metadata; metadata and old rows of the state",
    )
    ape_in_state: bool = scalar(
        bool,
        default=True,
        keyword=True,
        help="true: the state holds score + ape. false: it holds the raw score, and ape is added,"
        " in fp32, as rows are read",
    )
    work: str = scalar(
        str,
        default="all",
        choices=("all", "store", "reduce"),
        keyword=True,
        help="both steps, or one of them",
    )


def state_fields(
    dimensions: Mapping[str, int], arguments: Any, dtypes: Mapping[str, str]
) -> dict[str, Any]:
    """The problem fields of a call of a state op, but for the op's own.

    Raises:
        ValueError: a dimension that is not accepted. TableError, which is one, for head_dim.
    """
    head_dim, state_dim = dimensions["head_dim"], dimensions["state_dim"]
    StateProblem.field("head_dim").check(head_dim)
    if dimensions["page_size"] < 1:
        raise ValueError("paged_kv has page_size 0; accepted: 1 or more")
    if state_dim not in (head_dim, 2 * head_dim):
        raise ValueError(
            f"paged_kv has state_dim {state_dim}; accepted: {head_dim} (= head_dim), or"
            f" {2 * head_dim} for an overlapping window"
        )
    return {
        "head_dim": head_dim,
        "compress_ratio": arguments.compress_ratio,
        "overlap": state_dim != head_dim,
        "kv_dtype": dtypes["kv_score"],
        "state_dtype": dtypes["paged_kv"],
        "ape_in_state": arguments.ape_in_state,
    }


def window_shape(problem: Any, tuning: Any) -> WindowShape:
    """How the threads of a CTA share a window."""
    return WindowShape(
        compress_ratio=problem.compress_ratio,
        overlap=problem.overlap,
        state_dtype=problem.state_dtype,
        reduce_warps=tuning.reduce_warps,
        head_slice=tuning.head_slice,
    )
