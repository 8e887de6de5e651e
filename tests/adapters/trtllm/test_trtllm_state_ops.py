"""The two ops that reduce windows, through torch.ops.trtllm, against the engine's semantics."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_rows_close
from trtllm_calls import FLOATS, POISON, decode_call, prefill_call
from trtllm_memory import assert_same_memory, copied
from trtllm_oracle import decode, prefill

import kvfold.adapters.trtllm as trtllm
from kvfold.adapters.trtllm import state_ops
from kvfold.runtime import internals

DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module"
)
DECODE = torch.ops.trtllm.compressor_paged_kv_compress
PREFILL = torch.ops.trtllm.compressor_prefill_reduction
ORACLES = {DECODE: decode, PREFILL: prefill}


def assert_does(op, call, device):
    """An op does what its oracle does, and writes nothing else. Returns the call after it."""
    done = copied(call, device)
    assert_does_in_place(op, done)
    return done


def assert_does_in_place(op, call):
    """As assert_does, on the tensors of the call themselves."""
    expected, rows = ORACLES[op](call)
    op(*call.values())
    filled = ~rows.isnan().any(1)
    actual = call["output"].cpu()
    assert_rows_close(actual[filled], rows[filled], 4.0, "output")
    expected["output"][filled] = actual[filled]
    assert_same_memory(call, expected)


# ---- decode --------------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("next_n", range(1, 9))
@pytest.mark.parametrize("ratio", [2, 4, 128])
def test_decode_of_every_next_n(ratio, next_n, device):
    starts = [0, ratio - next_n % ratio, 3 * ratio - 1, 2 * ratio, ratio + 1]
    call = decode_call(starts, next_n, ratio=ratio, page_size=32, seed=next_n)
    assert_does(DECODE, call, device)


@DEVICES
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(
    ("kv_dtype", "state_dtype", "output_dtype"), list(itertools.product(FLOATS, repeat=3))
)
def test_decode_of_every_dtype(kv_dtype, state_dtype, output_dtype, ratio, device):
    dtypes = {"kv_dtype": kv_dtype, "state_dtype": state_dtype, "output_dtype": output_dtype}
    call = decode_call([ratio - 2, 5, 2 * ratio - 1], 3, ratio=ratio, head_dim=512, **dtypes)
    assert_does(DECODE, call, device)


@DEVICES
@pytest.mark.parametrize("page_size", [1, 3, 4, 128])
@pytest.mark.parametrize("two_dimensional", [False, True])
@pytest.mark.parametrize("ratio", [4, 128])
def test_decode_takes_slices_of_a_batch_with_prompts(ratio, two_dimensional, page_size, device):
    call = decode_call(
        [ratio - 1, 0, 2 * ratio - 2], 2, ratio=ratio, page_size=page_size,
        two_dimensional=two_dimensional, contexts=(37, 5), longer=3,
    )  # fmt: skip
    assert_does(DECODE, call, device)


@DEVICES
@pytest.mark.parametrize("ratio", [4, 128])
def test_decode_with_reserved_rows(ratio, device):
    call = decode_call([0, ratio - 1, ratio], 6, ratio=ratio, reserve=-(-6 // ratio))
    assert_does(DECODE, call, device)


@DEVICES
@pytest.mark.parametrize("ratio", [4, 128])
def test_decode_with_new_tokens_per_seq(ratio, device):
    counts = [6, 0, 1, 5, 3]
    starts = [ratio - 6, 7, ratio - 1, 2 * ratio - 4, 0]
    starts = [max(start, 0) for start in starts]
    assert_does(DECODE, decode_call(starts, 6, counts, ratio=ratio, longer=2), device)


@DEVICES
def test_decode_counts_tokens_by_next_n_and_not_by_cu_seq_lens(device):
    """A request's rows may lie anywhere in kv_score."""
    for counts in (None, [2, 1, 2]):
        call = decode_call([2, 6, 3], 2, counts, contexts=(9, 0))
        begins = call["cu_seq_lens"]
        begins.copy_(torch.tensor([9, 0, 4, -POISON], dtype=torch.int32))
        assert_does(DECODE, call, device)


@DEVICES
def test_decode_emits_a_window_again_after_rejected_tokens(device):
    call = decode_call([5], 4, page_size=4)
    done = assert_does(DECODE, call, "cpu")
    again = {**call, **{name: done[name] for name in ("paged_kv", "paged_score")}}
    again["kv_lens"] = done["kv_lens"] - 2  # positions 3..6: the window of 4..7 stays open
    again["kv_score"] = done["kv_score"] * 2
    again["output"] = call["output"]
    again["cu_kv_comp"] = torch.tensor([0, 1], dtype=torch.int32)
    assert_does(DECODE, again, device)


@DEVICES
@pytest.mark.parametrize("longer", [0, 2])
def test_decode_of_padding(longer, device):
    """A padding request has pages, or none, or fewer tokens than next_n."""
    call = decode_call([3, 6, 2, 7], 2, [2, 2, 2, 2], longer=longer)
    call["block_table_kv"][1] = -1
    call["block_table_score"][2] = -1
    call["kv_lens"][3] = 1
    assert_does(DECODE, call, device)


@DEVICES
def test_decode_of_counts_that_make_no_sense(device):
    call = decode_call([3, 6, 2, 7, 5], 4, [4, 4, 4, 4, 4])
    call["new_tokens_per_seq"].copy_(torch.tensor([5, -1, 4, 2**31 - 1, -(2**31)]))
    assert_does(DECODE, call, device)


@DEVICES
def test_decode_of_any_metadata_stays_inside_the_tensors(device):
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([-(2**31), -5, -1, 0, 1, 3, 8, 100, 2**31 - 1], dtype=torch.int32)
    names = ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_kv_comp")
    for _ in range(20):
        call = decode_call([2], 4, [4], ratio=4)
        for name in (*names, "new_tokens_per_seq"):
            x = call[name]
            spoilt = corners[torch.randint(len(corners), x.shape, generator=generator)]
            x.copy_(torch.where(torch.rand(x.shape, generator=generator) < 0.4, spoilt, x))
        assert_does(DECODE, call, device)


@DEVICES
def test_decode_of_no_request(device):
    assert_does(DECODE, decode_call([], 3, longer=2), device)
    assert_does(DECODE, decode_call([], 3, []), device)


@DEVICES
def test_decode_keeps_one_table_for_both_pools(device):
    call = decode_call([3, 6], 2, longer=1)
    call["block_table_score"] = call["block_table_kv"]
    call["paged_score"].nan_to_num_()
    assert_does(DECODE, call, device)


@DEVICES
@pytest.mark.parametrize("op", [DECODE, PREFILL])
def test_pools_of_one_memory_whose_tables_name_different_pages(op, device):
    """The engine's cache manager may give both pools as the whole memory that both lie in."""
    call = decode_call([3, 6], 2) if op is DECODE else prefill_call([(3, 9), (0, 6)])
    both = torch.stack([call["paged_kv"], call["paged_score"]], dim=1).flatten(0, 1)
    call["paged_kv"], call["paged_score"] = both, both.view_as(both)
    for number, name in enumerate(("block_table_kv", "block_table_score")):
        call[name] = torch.where(call[name] >= 0, 2 * call[name] + number, -1)
    assert_does(op, call, device)


# ---- prefill -------------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(
    ("kv_dtype", "state_dtype", "output_dtype"), list(itertools.product(FLOATS, repeat=3))
)
def test_prefill_of_every_dtype(kv_dtype, state_dtype, output_dtype, ratio, device):
    dtypes = {"kv_dtype": kv_dtype, "state_dtype": state_dtype, "output_dtype": output_dtype}
    spans = [(0, 2 * ratio + 3), (5, ratio), (ratio - 1, 1), (3, 0)]
    assert_does(PREFILL, prefill_call(spans, ratio=ratio, **dtypes), device)


@DEVICES
@pytest.mark.parametrize("two_dimensional", [False, True])
@pytest.mark.parametrize("page_size", [3, 32])
@pytest.mark.parametrize("ratio", [4, 128])
def test_prefill_of_layouts(ratio, page_size, two_dimensional, device):
    """The engine passes tables of the whole batch, and rows that reserve one per prompt."""
    call = prefill_call(
        [(0, ratio + 2), (ratio, 1), (1, 2 * ratio)], ratio=ratio, page_size=page_size,
        two_dimensional=two_dimensional, contexts=(2, 3), longer=2, reserve=3,
    )  # fmt: skip
    assert_does(PREFILL, call, device)


@DEVICES
def test_prefill_of_no_request(device):
    assert_does(PREFILL, prefill_call([], longer=1), device)
    assert_does(PREFILL, prefill_call([(0, 0), (7, 0)]), device)


@DEVICES
def test_prefill_of_pages_that_are_not_there(device):
    call = prefill_call([(0, 19), (6, 13)], ratio=4, page_size=4)
    call["block_table_kv"][0, 1] = -1
    call["block_table_score"][1, 3] = 2**31 - 1
    assert_does(PREFILL, call, device)


@DEVICES
@pytest.mark.parametrize("state_dtype", FLOATS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_whole_chunked_and_decoded_prompts_have_the_same_bits(ratio, state_dtype, device):
    total = 2 * ratio + 2
    whole = prefill_call([(0, total)], ratio=ratio, state_dtype=state_dtype, page_size=32)
    done = copied(whole, device)
    PREFILL(*done.values())

    pieces = copied(whole, device)
    pieces["paged_kv"].zero_()
    pieces["paged_score"].zero_()
    begin, row = 0, 0
    for new, op in [(ratio - 1, PREFILL), (ratio, PREFILL), (2, DECODE), (1, DECODE)]:
        end = begin + new
        int32 = {"dtype": torch.int32, "device": device}
        rows = end // ratio - begin // ratio
        changed = {
            "kv_score": pieces["kv_score"][begin:end],
            "kv_lens": torch.tensor([end], **int32),
            "cu_seq_lens": torch.tensor([0, new], **int32),
            "cu_kv_comp": torch.tensor([row, row + rows], **int32),
        }
        call = {**pieces, **changed}
        if op is PREFILL:
            call["start_pos"] = torch.tensor([begin], **int32)
        else:
            del call["start_pos"], call["max_outputs"]
            call["next_n"] = new
        op(*call.values())
        begin, row = end, row + rows
    assert begin == total and row == 2
    assert torch.equal(pieces["output"], done["output"])
    for name in ("paged_kv", "paged_score"):
        written = ~done[name].isnan().any(-1)
        assert written.sum() == total
        assert torch.equal(pieces[name][written], done[name][written])


# ---- steps ---------------------------------------------------------------------------------------


def finite(call):
    """The call with numbers in all pages, so that it may have the metadata of another one."""
    for name in ("paged_kv", "paged_score"):
        call[name].nan_to_num_()
    return call


METADATA = ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_kv_comp")
CALLS = {
    "decode": (DECODE, lambda seed=0: finite(decode_call([3, 6, 2], 2, longer=2, seed=seed))),
    "ragged": (
        DECODE,
        lambda seed=0: finite(decode_call([3, 6, 2], 2, [2, 0, 1], longer=2, seed=seed)),
    ),
    "prefill": (
        PREFILL,
        lambda seed=0: finite(prefill_call([(3, 5), (0, 9)], longer=2, seed=seed)),
    ),
}
EACH_CALL = pytest.mark.parametrize("kind", CALLS)


@pytest.fixture
def views(monkeypatch):
    """Counts how often the views of a call are made."""
    counter = SimpleNamespace(made=0)
    make = state_ops._Views.__init__

    def counted(*args):
        counter.made += 1
        make(*args)

    monkeypatch.setattr(state_ops._Views, "__init__", counted)
    return counter


@EACH_CALL
@pytest.mark.parametrize("found", [True, False])
def test_the_layers_of_a_step_share_views(kind, found, views, monkeypatch):
    """The layers have pools of their own, and views made anew of the same metadata."""
    monkeypatch.setattr(internals, "FOUND", found)
    op, make = CALLS[kind]
    first = make()
    calls = [first]
    for seed in (1, 2):
        other = make(seed)
        for name in (*METADATA, "new_tokens_per_seq"):
            if first.get(name) is not None:
                other[name] = first[name][:]
        calls.append(other)
    with trtllm.step():
        for call in calls:
            assert_does_in_place(op, call)
    assert views.made == 1
    assert_does_in_place(op, first)
    assert views.made == 2


@EACH_CALL
@pytest.mark.parametrize("change", ["memory", "strides", "length", "batch_size", "pools"])
def test_a_step_sees_what_has_changed(kind, change, views):
    op, make = CALLS[kind]
    call = make()
    with trtllm.step():
        assert_does_in_place(op, call)
        if change == "memory":  # other memory in the same tensors
            other = make(seed=1)
            for name in METADATA:
                call[name].set_(other[name])
            call |= {name: other[name] for name in ("paged_kv", "paged_score", "output")}
        elif change == "strides":
            rows, columns = call["batch_size"], call["block_table_kv"].shape[1]
            call["block_table_kv"] = call["block_table_kv"].as_strided(
                (rows, columns), (2 * columns, 1)
            )
        elif change == "length":
            call["cu_kv_comp"] = call["cu_kv_comp"][:-1]
        elif change == "batch_size":
            call["batch_size"] = 1
        else:
            for name in ("paged_kv", "paged_score"):
                call[name] = call[name].flatten(1)
        assert_does_in_place(op, call)
    assert views.made == 2


def test_a_step_sees_other_numbers_of_new_tokens(views):
    call = decode_call([3, 6, 2], 2)
    with trtllm.step():
        for next_n, counts in [(2, None), (1, None), (1, [1, 0, 1]), (2, [1, 0, 1])]:
            call["next_n"] = next_n
            call["new_tokens_per_seq"] = counts and torch.tensor(counts, dtype=torch.int32)
            assert_does_in_place(DECODE, call)
    assert views.made == 4


@EACH_CALL
def test_a_step_keeps_metadata_and_nothing_of_a_layer(kind):
    op, make = CALLS[kind]
    call = make()
    memory = {
        name: weakref.ref(x.untyped_storage())
        for name, x in call.items()
        if isinstance(x, torch.Tensor)
    }
    with trtllm.step():
        op(*call.values())
        call.clear()
        kept = {name for name, storage in memory.items() if storage() is not None}
        metadata = {*METADATA, *(["new_tokens_per_seq"] if kind == "ragged" else [])}
        assert kept == metadata
    assert all(storage() is None for storage in memory.values())


@EACH_CALL
def test_a_refused_call_of_a_step_leaves_nothing_behind(kind):
    op, make = CALLS[kind]
    call = make()
    with trtllm.step():
        for _ in range(2):
            assert_refused(op, call, "kv_lens is of length 1", kv_lens=call["kv_lens"][:1])
        assert_does_in_place(op, call)
        assert_refused(op, call, "page_size|state|paged_kv", page_size=7)
        assert_does_in_place(op, call)


# ---- errors --------------------------------------------------------------------------------------


def assert_refused(op, call, message, **changed):
    """ValueError, and nothing is written."""
    call = {**call, **changed}
    before = copied(call)
    with pytest.raises(ValueError, match=message):
        op(*call.values())
    assert_same_memory(call, before)


@pytest.mark.parametrize("next_n", [0, 9, -1])
def test_next_n_outside_is_refused(next_n):
    message = rf"next_n is {next_n}; accepted: 1 to 8"
    assert_refused(DECODE, decode_call([3], 1), message, next_n=next_n)


@pytest.mark.parametrize(
    ("name", "least"),
    [("block_table_kv", 2), ("block_table_score", 2), ("kv_lens", 2), ("cu_seq_lens", 3),
     ("cu_kv_comp", 3)],
)  # fmt: skip
@pytest.mark.parametrize(("op", "make"), [(DECODE, "decode"), (PREFILL, "prefill")])
def test_a_tensor_shorter_than_the_batch_is_refused(op, make, name, least):
    call = decode_call([3, 5], 1) if make == "decode" else prefill_call([(3, 1), (5, 4)])
    message = rf"{name} is of length {least - 1}; accepted: {least} or more"
    assert_refused(op, call, message, **{name: call[name][:-1]})


def test_what_is_no_state_of_such_pages_is_refused():
    call = decode_call([3, 5], 1, page_size=8)
    message = r"paged_kv is of shape \[\d+, 8, 256\] .*; accepted: \[num_pages, 7, 256\]"
    assert_refused(DECODE, call, message, page_size=7)
    message = r"paged_score is of shape \[\d+, 1024\] and strides .*; accepted: "
    pool = torch.zeros(2 * call["paged_score"].shape[0], 1024)[::2]
    assert_refused(DECODE, call, message, paged_score=pool)
    message = r"output is of shape \[\d, 128\]; accepted: \[num_outputs, head_dim = 512\]"
    assert_refused(DECODE, call, message, head_dim=512)
    assert_refused(DECODE, call, "batch_size is -1; accepted: 0 or more", batch_size=-1)


def test_kvfold_refuses_what_the_adapter_passes_on():
    call = decode_call([3, 5], 1)
    assert_refused(DECODE, call, "kv_lens is of torch.int64", kv_lens=call["kv_lens"].long())
    counts = torch.ones(2, dtype=torch.int64)
    assert_refused(DECODE, call, "new_tokens is of torch.int64", new_tokens_per_seq=counts)
    halves = call["kv_score"].half()
    assert_refused(DECODE, call, "kv_score is of torch.float16", kv_score=halves)
    assert_refused(PREFILL, prefill_call([(0, 9)]), "compress_ratio", compress_ratio=0)


def test_the_functions_are_the_ops():
    call = decode_call([3, 6], 2)
    by_function, by_op = copied(call), copied(call)
    trtllm.compressor_paged_kv_compress(**by_function)
    DECODE(*by_op.values())
    assert_same_memory(by_function, by_op)
