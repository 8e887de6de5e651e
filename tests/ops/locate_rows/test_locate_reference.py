"""The contract by examples worked out by hand, and the reference against the oracle."""

import pytest
import torch
from locate_calls import (
    BEFORE,
    CASES,
    Call,
    assert_follows_contract,
    assert_safe,
    make,
    random_call,
    run_op,
)

ORACLE = {"oracle": lambda call: [x.tolist() for x in call.expected().values()]}


def by_op(call: Call) -> list[list[int]]:
    run_op(call)
    return [call.positions.tolist(), call.slots.tolist()]


# ---- examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [ORACLE["oracle"], by_op], ids=["oracle", "op"])
class TestExamples:
    """compress_ratio 4 unless an example says otherwise; three rows per page."""

    def test_a_window_has_the_position_of_its_first_token_and_a_row_of_its_page(self, run):
        # Windows 1, 2 and 3 of a request that had 6 tokens and has 17.
        call = make([(6, 11)]).with_integers(block_table_cache=[7, 5])
        assert run(call) == [[4, 8, 12, -1, -1], [22, 23, 15, -1, -1]]

    def test_a_window_has_the_slot_of_its_last_token(self, run):
        # The new tokens are at positions 6 to 16. Windows end at positions 7, 11 and 15.
        call = make([(6, 11)], source="token_slots")
        call = call.with_integers(token_slots=[60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160])
        assert run(call) == [[4, 8, 12, -1, -1], [70, 110, 150, -1, -1]]

    def test_the_tokens_of_the_second_request_come_after_those_of_the_first(self, run):
        call = make([(0, 3), (3, 2)], source="token_slots", reserve=1)
        call = call.with_integers(token_slots=[10, 11, 12, 23, 24])
        assert run(call) == [[-1, 0, -1, -1], [-1, 23, -1, -1]]

    def test_rows_before_the_first_are_left_alone_and_all_others_are_written(self, run):
        call = make([(0, 4), (0, 3), (0, 8)], reserve=2, first_row=1)
        call = call.with_integers(block_table_cache=[4, 5, 6])
        assert run(call) == [
            [BEFORE, 0, -1, -1, -1, 0, 4, -1, -1],
            [BEFORE, 12, -1, -1, -1, 18, 19, -1, -1],
        ]

    def test_a_window_beyond_the_reserved_rows_has_no_row(self, run):
        call = make([(0, 12), (0, 4)], reserve=[2, 1], spare_rows=0)
        call = call.with_integers(block_table_cache=[[0, 1], [2, 3]])
        assert run(call) == [[0, 4, 0], [0, 1, 6]]

    def test_a_negative_page_and_one_outside_the_table_give_no_slot(self, run):
        call = make([(0, 28)], max_pages=2).with_integers(block_table_cache=[-5, 1])
        assert run(call) == [
            [0, 4, 8, 12, 16, 20, 24, -1, -1],
            [-1, -1, -1, 3, 4, 5, -1, -1, -1],
        ]

    def test_a_request_that_a_state_op_skips_fills_no_row(self, run):
        call = make([(0, 4), (0, 5), (0, 4)], reserve=1, next_n=4, num_tokens=12)
        call = call.with_integers(block_table_cache=[0, 1, 2])
        assert run(call) == [[0, -1, -1, -1, -1], [0, -1, -1, -1, -1]]

    def test_without_bounds_only_what_makes_no_sense_is_skipped(self, run):
        call = make([(0, 4), (0, 5), (0, 4)], reserve=1)
        call = call.with_integers(block_table_cache=[0, 1, 2], kv_lens=[4, 5, 3])
        assert run(call) == [[0, 0, -1, -1, -1], [0, 3, -1, -1, -1]]

    def test_the_length_of_token_slots_is_the_bound_of_num_tokens(self, run):
        call = make([(0, 4), (0, 4)], source="token_slots")
        call = call.with_integers(token_slots=range(8), cu_seq_lens=[0, 4, 9], kv_lens=[4, 5])
        assert run(call) == [[0, -1, -1, -1], [3, -1, -1, -1]]

    def test_a_token_outside_token_slots_gives_no_slot(self, run):
        call = make([(0, 4), (0, 4)], source="token_slots", num_tokens=100)
        call = call.with_integers(token_slots=range(8), cu_seq_lens=[1, 5, 9])
        assert run(call) == [[0, 0, -1, -1], [4, -1, -1, -1]]

    def test_the_last_window_that_there_is(self, run):
        call = make([(0, 2)], compress_ratio=2**30 - 1, reserve=3, spare_rows=0)
        call = call.with_integers(kv_lens=[2**31 - 1], cu_seq_lens=[0, 2**31 - 1])
        call = call.with_integers(block_table_cache=[2**31 - 1])
        assert run(call) == [[0, 2**30 - 1, -1], [6442450941, 6442450942, -1]]


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_reference_follows_the_contract(name):
    assert_follows_contract(run_op, CASES[name]())


@pytest.mark.parametrize("seed", range(60))
def test_the_reference_runs_random_calls(seed):
    assert_follows_contract(run_op, random_call(seed))


@pytest.mark.parametrize("share", [0.05, 0.3, 1])
@pytest.mark.parametrize("seed", range(40))
def test_the_reference_is_safe_for_any_metadata(seed, share):
    assert_follows_contract(run_op, random_call(seed).with_nonsense(share, seed))
    assert_safe(run_op, random_call(seed).with_nonsense(share, seed, monotone=False))


def test_prompts_and_decodes_share_one_output():
    decodes = make([(7, 1), (6, 1), (3, 1)], reserve=1, first_row=5, spare_rows=0, next_n=1)
    prompts = make([(0, 13), (2, 8)], spare_rows=3)
    assert prompts.positions.numel() == decodes.positions.numel() == 8
    for call in (prompts, decodes):
        args, kwargs = call.args_and_kwargs()
        args = (*args[:3], prompts.positions, prompts.slots, *args[5:])
        torch.ops.kvfold.locate_rows(*args, **kwargs)
    assert prompts.positions.tolist() == [0, 4, 8, 0, 4, 4, -1, 0]


def test_the_random_calls_have_rows_of_every_kind():
    kinds = {"filled": 0, "filled without a slot": 0, "not filled": 0, "left alone": 0}
    for seed in range(60):
        call = random_call(seed)
        positions, slots = call.expected().values()
        kinds["filled"] += int(((positions >= 0) & (positions != BEFORE) & (slots >= 0)).sum())
        kinds["filled without a slot"] += int(((positions >= 0) & (slots < 0)).sum())
        kinds["not filled"] += int((positions == -1).sum())
        kinds["left alone"] += int((positions == BEFORE).sum())
    assert min(kinds.values()) > 20, kinds
