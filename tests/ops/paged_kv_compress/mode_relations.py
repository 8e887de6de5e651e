"""What calls in different modes have in common, to the bit.

RELATIONS maps a name to a function that runs an implementation in several modes and compares.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from calls import MUTATED, STATE, Call, make
from numerics import assert_same_bits
from torch import Tensor

Run = Callable[[Call], None]
RELATIONS: dict[str, Callable[[Run, torch.device | str], None]] = {}

SPANS = [(7, 2), (6, 4), (0, 4), (9, 0)]
CALLS = {
    "r4": partial(make, SPANS, head_dim=128, page_size=2, output_dtype="fp32"),
    "r4_bf16": partial(make, SPANS, head_dim=128, kv_dtype="fp32", state_dtype="bf16"),
    "r128": partial(
        make, [(126, 4), (128, 3)], head_dim=128, compress_ratio=128, page_size=8,
        output_dtype="fp32",
    ),
}  # fmt: skip


def assert_same(actual: Call, expected: Call, names=MUTATED) -> None:
    for name in names:
        assert_same_bits(getattr(actual, name), getattr(expected, name), name)


def two_steps_in_any_order_are_both(build, run: Run, device) -> None:
    """Each of them writes its own tensors alone."""
    call = build(device=device)
    both, store_first, reduce_first = (call.clone() for _ in range(3))
    run(both)
    run(replace(store_first, work="store"))
    assert_same(store_first, both, STATE)
    assert_same(store_first, call, ("output",))
    run(replace(store_first, work="reduce"))
    assert_same(store_first, both)
    run(replace(reduce_first, work="reduce"))
    assert_same(reduce_first, call, STATE)
    assert_same(reduce_first, both, ("output",))
    run(replace(reduce_first, work="store"))
    assert_same(reduce_first, both)


def with_ape(call: Call) -> Tensor:
    """The score state of the call, of raw scores, with ape added in fp32 to every old row."""
    score = call.paged_score.clone()
    new = call.cu_seq_lens.diff()
    for request, start in enumerate((call.kv_lens - new).tolist()):
        position = torch.arange(start, device=score.device)
        page = call.block_table_score[request, position // score.size(1)].long()
        score[page, position % score.size(1)] += call.ape[position % call.compress_ratio]
    return score


def raw_scores_in_fp32_give_the_same_output(build, run: Run, device) -> None:
    raw = build(device=device, state_dtype="fp32", ape_in_state=False)
    biased = replace(raw.clone(), ape_in_state=True, paged_score=with_ape(raw))
    assert not torch.equal(raw.paged_score.nan_to_num(), biased.paged_score.nan_to_num())
    # The second step finds rows in the state that the first has stored.
    later = {"kv_lens": raw.kv_lens + raw.cu_seq_lens.diff()}
    for step in ({}, later):
        run(replace(raw, **step))
        run(replace(biased, **step))
        assert_same(raw, biased, ("paged_kv", "output"))


RELATIONS |= {
    f"{relation.__name__}__{name}": partial(relation, CALLS[name])
    for relation, names in (
        (two_steps_in_any_order_are_both, CALLS),
        (raw_scores_in_fp32_give_the_same_output, ("r4", "r128")),
    )
    for name in names
}
