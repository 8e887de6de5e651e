"""Triton functions that the state ops share: rounding, the paged state, the softmax's terms."""
# Triton's language is not Python's: annotations say how the compiler takes an argument.
# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportRedeclaration=false

import triton
import triton.language as tl

# Triton's default of enable_fp_fusion depends on its version.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


if triton.knobs.runtime.interpret:

    @triton.jit
    def round_to(x, dtype: tl.constexpr):
        """fp32 to dtype, to nearest even; the interpreter's own cast to bf16 truncates."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return x

else:

    @triton.jit
    def round_to(x, dtype: tl.constexpr):
        """fp32 to dtype, to nearest even."""
        return x.to(dtype)


@triton.jit
def scalar_mask(condition):
    """A condition as a mask: Triton 3.9's interpreter gives a comparison its operands' type."""
    return tl.full((), True, tl.int1) & condition


@triton.jit
def locate(position, wanted, state, page_is_power_of_two: tl.constexpr):
    """Which wanted rows are present, and where in paged_kv and in paged_score they start."""
    table_kv, table_score, max_pages, num_pages, page_size, page_shift = state[:6]
    kv_page_stride, kv_slot_stride, score_page_stride, score_slot_stride = state[6:]
    if page_is_power_of_two:
        logical = position >> page_shift
        slot = position & (page_size - 1)
    else:
        logical = position // page_size
        slot = position % page_size
    # One mask for all rows: with one each, the loads would queue for predicate registers.
    wanted = wanted & (logical < max_pages)
    logical = tl.where(wanted, logical, 0)
    any_page = scalar_mask(max_pages > 0)
    kv_page = tl.load(table_kv + logical, mask=any_page, other=-1)
    score_page = tl.load(table_score + logical, mask=any_page, other=-1)
    # A negative page is out of range, too, when unsigned.
    present = wanted & (kv_page.to(tl.uint32) < num_pages) & (score_page.to(tl.uint32) < num_pages)
    kv_at = kv_page * kv_page_stride + slot * kv_slot_stride
    score_at = score_page * score_page_stride + slot * score_slot_stride
    return present, kv_at, score_at


@triton.jit
def load_new(
    token, ape, wanted, state_dim: tl.constexpr, dtype: tl.constexpr, ape_in_state: tl.constexpr
):
    """New rows, at pointers to their KV and their ape.

    Returns KV and score as the state holds them, and the score with ape in fp32.
    """
    kv = tl.load(token, mask=wanted, other=0.0).to(tl.float32)
    score = tl.load(token + state_dim, mask=wanted, other=0.0).to(tl.float32)
    embedding = tl.load(ape, mask=wanted, other=0.0)
    if ape_in_state:
        stored = round_to(score + embedding, dtype)
        return round_to(kv, dtype), stored, stored.to(tl.float32)
    stored = round_to(score, dtype)
    return round_to(kv, dtype), stored, stored.to(tl.float32) + embedding


@triton.jit
def larger(a, b):
    """The greater; NaN where either is, like torch.softmax."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weigh(score, kv, present, top):
    """exp(score - top), and that times kv; 0 for absent rows."""
    # Subtract before scaling to base 2, so that no finite score overflows.
    weight = tl.exp2((score - top[None, :]) * 1.4426950408889634)
    weight = tl.where(present, weight, 0.0)
    return weight, tl.where(present, weight * kv.to(tl.float32), 0.0)


@triton.jit
def softmax_sum(kv, score, present):
    """Sum of kv over the rows, weighted by a softmax over score in fp32; 0 if no row is present."""
    score = tl.where(present, score, -float("inf"))
    weight, weighted = weigh(score, kv, present, tl.max(score, axis=0))
    # Both sums in one exchange between warps.
    total, compressed = tl.split(tl.sum(tl.join(weight, weighted), axis=0))
    # The row at the top weighs 1: only a window with no row present has a total of 0.
    return compressed / tl.where(total == 0.0, 1.0, total)
