"""The torch ops: their checks, and how they stand with torch.library and torch.compile."""

import inspect
from dataclasses import replace

import pytest
import torch
from numerics import assert_same_bits
from store_calls import (
    ALL_OUTPUTS,
    CALLS,
    DECODE,
    FLOATS,
    HEAD_DIMS,
    MUTATED,
    OPS,
    OUTPUTS,
    PREFETCH,
    PREFILL,
    STATE,
    StoreCall,
    assert_is,
    by_two_ops,
    make,
    run_by_dispatcher,
    run_op,
    run_variant,
    variant_of,
)
from torch import Tensor

import kvfold
import kvfold.torch_ops  # registers torch.ops.kvfold, whichever test runs first
from kvfold.codegen import Bucket, TableError, Variant, load_table, op_spec
from kvfold.runtime.arguments import DTYPES, check

BOTH_OPS = pytest.mark.parametrize("op", OPS)
ENTRIES = pytest.mark.parametrize("run", [run_op, run_by_dispatcher])
OPTIONAL = ("scale", *OUTPUTS)
OPTIONAL_OF = {DECODE: (*OPTIONAL, "new_tokens"), PREFILL: OPTIONAL}
TABLE = load_table()


def small(op: str, **fields) -> StoreCall:
    return make(op, [(3, 5), (6, 1), (0, 3)], **{"outputs": ALL_OUTPUTS, "reserve": 2} | fields)


def names_of(op: str) -> tuple[str, ...]:
    return tuple(one.name for one in CALLS[op].declared())


def positional(op: str) -> int:
    """The number of arguments that are passed by position."""
    return len(small(op).args_and_kwargs()[0])


def run_copy(call: StoreCall, run=run_op) -> StoreCall:
    copy = call.clone()
    run(copy)
    return copy


# ---- The function is what the declaration says ---------------------------------------------------


@BOTH_OPS
def test_the_signature_is_the_declaration(op):
    parameters = inspect.signature(getattr(kvfold, op)).parameters
    scalars = CALLS[op].declared_scalars()
    defaults = {one.name: one.default for one in scalars if one.keyword}
    defaults |= dict.fromkeys(OPTIONAL_OF[op])
    assert set(parameters) == set(names_of(op))
    assert tuple(parameters)[: positional(op)] == names_of(op)[: positional(op)]
    types = {one.name: one.type.__name__ for one in scalars}
    types |= dict.fromkeys(OPTIONAL_OF[op], "Tensor | None") | {"row_dtype": "torch.dtype"}
    for name, parameter in parameters.items():
        assert parameter.default == defaults.get(name, inspect.Parameter.empty)
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (name in defaults)
        assert parameter.annotation == types.get(name, "Tensor")


@BOTH_OPS
def test_the_docstring_explains_every_argument(op):
    text = inspect.getdoc(getattr(kvfold, op))
    explained = text[text.index("Args:") : text.index("Raises:")]
    entries = explained.replace("\n        ", " ").splitlines()[1:]
    heads = [entry.strip().split(": ")[0] for entry in entries if entry.strip()]
    named = [name for head in heads for name in head.split(", ")]
    assert sorted(named) == sorted(names_of(op))


@BOTH_OPS
def test_the_schema_declares_what_is_written_and_the_defaults(op):
    schema = getattr(torch.ops.kvfold, op).default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == list(MUTATED)
    assert tuple(a.name for a in schema.arguments) == names_of(op)
    assert "str row_dtype, *, " in str(schema)
    scalars = CALLS[op].declared_scalars()
    defaults = {one.name: one.default for one in scalars if one.keyword}
    defaults |= dict.fromkeys(OPTIONAL_OF[op])
    assert {a.name: a.default_value for a in schema.arguments if a.kwarg_only} == defaults


@BOTH_OPS
def test_all_entries_do_the_same(op):
    call = small(op, format="fp8_tensor", scale=0.37, rotate=True)
    expected = by_two_ops(call)
    function = getattr(kvfold, op)
    assert_is(run_copy(call), expected)
    assert_is(run_copy(call, run_by_dispatcher), expected)
    by_name = run_copy(call, lambda c: function(**{n: getattr(c, n) for n in names_of(op)}))
    assert_is(by_name, expected)


@BOTH_OPS
def test_a_missing_an_unknown_and_a_positional_keyword_are_type_errors(op):
    function, (args, kwargs) = getattr(kvfold, op), small(op).args_and_kwargs()
    with pytest.raises(TypeError, match="output"):
        function(*args, **kwargs, output=args[0])
    with pytest.raises(TypeError, match="positional"):
        function(*args, "once")
    with pytest.raises(TypeError, match="row_dtype"):
        function(*args[:-1], **kwargs)


@BOTH_OPS
def test_optional_tensors_may_be_left_out(op):
    call = small(op, outputs=())
    plain = call.clone()
    getattr(kvfold, op)(*plain.args_and_kwargs()[0])
    assert_is(plain, by_two_ops(call))


@BOTH_OPS
@pytest.mark.parametrize(
    ("row_dtype", "name"), [(torch.float16, "torch.float16"), (torch.int32, "int32")]
)
def test_another_row_dtype_is_named(op, row_dtype, name):
    args, kwargs = small(op).args_and_kwargs()
    with pytest.raises(ValueError, match=f"row_dtype is '{name}'; accepted: 'bf16', 'fp32'"):
        getattr(kvfold, op)(*args[:-1], row_dtype, **kwargs)


@BOTH_OPS
@pytest.mark.parametrize("row_dtype", FLOATS)
def test_row_dtype_is_a_torch_dtype_and_torch_ops_take_its_name(op, row_dtype):
    call = small(op, row_dtype=row_dtype)
    by_name, by_dtype = call.clone(), call.clone()
    args, kwargs = by_dtype.args_and_kwargs()
    assert args[-1] == row_dtype
    getattr(kvfold, op)(*args[:-1], DTYPES[row_dtype], **kwargs)
    run_by_dispatcher(by_name)
    assert_is(by_dtype, by_name)
    assert_is(by_dtype, by_two_ops(call))


# ---- Little or no work ---------------------------------------------------------------------------


@BOTH_OPS
@ENTRIES
def test_a_call_without_rows_stores_the_state(op, run):
    call = small(op)
    none = {name: getattr(call, name)[:0] for name in ("positions", "slots", *OUTPUTS)}
    after = run_copy(replace(call, **none), run)
    whole = run_copy(call)
    assert torch.equal(after.cache, call.cache)
    for name in STATE:
        assert_same_bits(getattr(after, name), getattr(whole, name), name)


@BOTH_OPS
@ENTRIES
def test_a_call_without_requests_or_tokens_does_nothing(op, run):
    calls = [make(op, []), make(op, [(3, 0), (5, 0)])]
    call = small(op)
    no_request = replace(
        call,
        block_table_kv=call.block_table_kv[:0],
        block_table_score=call.block_table_score[:0],
        kv_lens=call.kv_lens[:0],
        cu_seq_lens=call.cu_seq_lens[:1],
        cu_outputs=call.cu_outputs[:1],
    )
    for one in (*calls, no_request):
        assert_is(run_copy(one, run), one)


@BOTH_OPS
def test_one_block_table_for_both_pools(op):
    call = small(op, layout="packed")
    call = replace(call, block_table_score=call.block_table_kv)
    assert_is(run_copy(call), by_two_ops(call))


@BOTH_OPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_has_no_effect(op, dtype):
    call = small(op, format="fp4_288", rotate=True)
    expected, after = by_two_ops(call), call.clone()
    torch.set_default_dtype(dtype)
    try:
        run_op(after)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_is(after, expected)


@BOTH_OPS
def test_no_gradient_is_recorded(op):
    call = small(op)
    parameters = {name: torch.nn.Parameter(getattr(call, name)) for name in ("ape", "weight")}
    run_op(replace(call, **parameters))
    assert not any(getattr(call, name).requires_grad for name in MUTATED)


# ---- Argument errors -----------------------------------------------------------------------------


def unaligned(tensor: Tensor, elements: int = 1) -> Tensor:
    """The same values so many elements off a 16-byte boundary."""
    flat = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:]
    return flat.view(tensor.shape).copy_(tensor)


FLOAT = "torch.bfloat16 or torch.float32"
NUM_ROWS = 6  # of `small`
DATA, SCALES = 128, 4  # bytes of its rows
BAD = {
    "kv_score width": ("kv_score", lambda t: t[:, :-8].clone(), r"\[num_tokens, 2\*state_dim\]"),
    "ape shape": ("ape", lambda t: t[:-1], r"\[compress_ratio, state_dim\] = \[4, 256\]"),
    "paged_kv state_dim": ("paged_kv", lambda t: t[..., :64], "256 for an overlapping window"),
    "paged_score dtype": ("paged_score", lambda t: t.bfloat16(), "torch.float32, as paged_kv"),
    "block_table_kv": ("block_table_kv", lambda t: t[:-1], r"\[batch, max_pages\]"),
    "kv_lens dtype": ("kv_lens", lambda t: t.long(), "torch.int32"),
    "cu_seq_lens": ("cu_seq_lens", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
    "cu_outputs": ("cu_outputs", lambda t: t[:-1], r"\[batch\+1\] = \[4\]"),
    "weight dtype": ("weight", lambda t: t.double(), FLOAT),
    "weight dims": ("weight", lambda t: t[None], r"\[head_dim\]"),
    "weight start": ("weight", unaligned, "multiples of 16 bytes"),
    "rope_table dtype": ("rope_table", lambda t: t.bfloat16(), "torch.float32"),
    "rope_table parts": ("rope_table", lambda t: t[:, :1], r"= \[33, 2, 32\]"),
    "positions dtype": ("positions", lambda t: t.long(), "torch.int32"),
    "positions dims": ("positions", lambda t: t[None], r"\[num_rows\]"),
    "slots dtype": ("slots", lambda t: t.int(), "torch.int64"),
    "slots shape": ("slots", lambda t: t[:-1], rf"\[num_rows\] = \[{NUM_ROWS}\]"),
    "cache dtype": ("cache", lambda t: t.view(torch.int8), "torch.uint8"),
    "cache bytes": ("cache", lambda t: t[:, :-1], f"{4 * (DATA + SCALES)} or more"),
    "cache start": ("cache", lambda t: unaligned(t, 2), "multiples of 4 bytes"),
    "cache expanded": ("cache", lambda t: t[:1].expand(t.shape), "rows that do not overlap"),
    "eps": ("eps", lambda v: -1e-6, "0 or more, finite"),
    "rows_per_page": ("rows_per_page", lambda v: 0, "1 or more"),
    "format": ("format", lambda v: "fp8", ", ".join(TABLE.formats)),
    "row_dtype name": ("row_dtype", lambda v: "half", "'bf16', 'fp32'"),
    "row_dtype of ints": ("row_dtype", lambda v: "int32", "'bf16', 'fp32'"),
    "rounding": ("rounding", lambda v: "never", "'once', 'before_codes'"),
    "prefetch": ("prefetch", lambda v: "all", "'none', 'metadata', 'state'"),
    "work": ("work", lambda v: "both", "'all', 'store', 'reduce'"),
    "compress_ratio": ("compress_ratio", lambda v: 0, "1 or more"),
    "latent_out dtype": ("latent_out", lambda t: t.half(), FLOAT),
    "latent_out rows": ("latent_out", lambda t: t[:-1], rf"= \[{NUM_ROWS}, 128\]"),
    "rows_out columns": ("rows_out", lambda t: t[:, :64], rf"= \[{NUM_ROWS}, 128\]"),
    "codes_out bytes": ("codes_out", lambda t: t[:, :-1], f"{DATA}"),
    "scales_out bytes": ("scales_out", lambda t: t[:, :-1], f"{SCALES}"),
}
BAD_DECODE = {"next_n": ("next_n", lambda v: 0, "1, 2, 3, ")}
BAD_PREFILL = {
    "write_state": ("write_state", lambda v: "some", "'all', 'tail'"),
    "max_rollback": ("max_rollback", lambda v: -1, "0 to 2147483647"),
    "state_period": ("state_period", lambda v: 2**31, "0 to 2147483647"),
}
FAULTS = [
    *((op, *fault) for op in OPS for fault in BAD.values()),
    *((DECODE, *fault) for fault in BAD_DECODE.values()),
    *((PREFILL, *fault) for fault in BAD_PREFILL.values()),
]
IDS = [*(f"{op}-{name}" for op in OPS for name in BAD), *BAD_DECODE, *BAD_PREFILL]


def assert_refused(call: StoreCall, changes: dict, message: str, run=run_op) -> None:
    """Raises ValueError with this message, and writes nothing."""
    before = call.clone()
    with pytest.raises(ValueError, match=rf"^kvfold\.{call.op}: {message}"):
        run(replace(call, **changes))
    assert_is(call, before)


@ENTRIES
@pytest.mark.parametrize(("op", "name", "spoil", "accepted"), FAULTS, ids=IDS)
def test_a_bad_argument_is_named_and_nothing_is_written(op, name, spoil, accepted, run):
    call = small(op)
    changes = {name: spoil(getattr(call, name))}
    assert_refused(call, changes, rf"{name} (is|has) .*; accepted: .*{accepted}", run)


@BOTH_OPS
@ENTRIES
def test_what_does_not_go_together_is_refused_and_nothing_is_written(op, run):
    call = small(op)
    assert_refused(call, {"scale": torch.ones(1)}, "scale is a tensor; accepted: None", run)
    assert_refused(call, {"rounding": "codes_from_bf16"}, "rounding is 'codes_from_bf16'", run)
    assert_refused(call, {"rows_per_page": 5}, "cache has 528 bytes per page; accepted: 660", run)
    mixed = small(op, format="mixed_584", rounding="codes_from_bf16")
    assert_refused(mixed, {"rotate": True}, "rotate is True; accepted: False", run)
    changes = {"rope_table": torch.zeros(33, 2, 16)}
    assert_refused(mixed, changes, "weight is of head_dim 128; accepted: 32 plus a multiple", run)


@BOTH_OPS
@pytest.mark.parametrize("head_dim", [8, 64, 192, 1024])
def test_another_head_dim_is_refused(op, head_dim):
    weight, state_dim = torch.zeros(head_dim), 2 * head_dim
    pages = {name: torch.zeros(9, 4, state_dim) for name in STATE}
    new = {"kv_score": torch.zeros(9, 2 * state_dim), "ape": torch.zeros(4, state_dim)}
    changes = {"weight": weight, **pages, **new}
    message = rf"weight has head_dim {head_dim}; accepted: 128, 256, 512"
    assert_refused(small(op, outputs=()), changes, message)


@BOTH_OPS
@pytest.mark.parametrize("row_dtype", [torch.float16, torch.int32, torch.uint8, 2, None, True])
def test_a_row_dtype_that_is_no_choice_is_refused(op, row_dtype):
    assert_refused(small(op), {"row_dtype": row_dtype}, "row_dtype is .*; accepted: ")


@BOTH_OPS
@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", "1e-6"), ("rows_per_page", 4.0), ("format", None), ("rounding", b"once"),
     ("rotate", 1), ("prefetch", True), ("ape_in_state", "no"), ("work", None)],
)  # fmt: skip
def test_a_scalar_of_another_type_is_named_and_nothing_is_written(op, name, value):
    kind = {one.name: one.type.__name__ for one in CALLS[op].declared_scalars()}[name]
    assert_refused(small(op), {name: value}, rf"{name} is .*; accepted: a value of type {kind}$")


@BOTH_OPS
def test_what_is_no_tensor_or_on_another_device_is_named(op):
    call = small(op, format="fp8_tensor", scale=0.5)
    if op == DECODE:
        call = call.without_last([0] * len(call.kv_lens))
    for one in CALLS[op].declared_tensors():
        tensor = getattr(call, one.name)
        assert_refused(call, {one.name: tensor.tolist()}, f"{one.name} is a list")
        message = r"\w+ is on (cpu|meta); accepted: (cpu|meta), where kv_score is"
        assert_refused(call, {one.name: tensor.to("meta")}, message)
        if not one.optional:
            assert_refused(call, {one.name: None}, f"{one.name} is a NoneType; accepted: a tensor")


@BOTH_OPS
@pytest.mark.parametrize("name", MUTATED)
def test_memory_that_is_written_and_shared_is_refused(op, name):
    call = small(op)
    for other in ("kv_score", "weight", "slots", "paged_kv", "cache", "codes_out"):
        if other == name:
            continue
        memory = torch.zeros(1 << 17, dtype=torch.uint8)
        shared = {}
        for one in (name, other):
            tensor = getattr(call, one)
            part = memory[: tensor.numel() * tensor.element_size()]
            shared[one] = part.view(tensor.dtype).view(tensor.shape)
        shared["block_table_score"] = call.block_table_kv  # with another they may be one pool
        names = rf"({name}|{other})"
        message = rf"{names} is in the memory of {names}; accepted: memory of its own"
        assert_refused(call, shared, message)
        assert not memory.any(), other


# ---- Dispatch ------------------------------------------------------------------------------------


@BOTH_OPS
@pytest.mark.parametrize("overlap", [False, True])
def test_the_arguments_tell_the_problem_and_the_size(op, overlap):
    fields = {
        "head_dim": 256,
        "compress_ratio": 8,
        "overlap": overlap,
        "kv_dtype": "fp32",
        "state_dtype": "bf16",
        "ape_in_state": overlap,
    }
    call = make(op, [(7, 6), (4, 3)], **fields)
    found = check(op_spec(op), call)
    problem = fields | ({"next_n": 8} if op == DECODE else {})
    assert found.problem == op_spec(op).problem.of(problem)
    assert (found.size, found.device) == (2 if op == DECODE else 9, torch.device("cpu"))


def problems(op: str) -> set:
    return {variant.problem for variant in TABLE.variants if variant.op == op}


@BOTH_OPS
def test_the_table_serves_the_problems_of_the_models(op):
    found = problems(op)
    for head_dim in (128, 512):
        for ratio in (2, 4, 128):
            chosen = [p for p in found if (p.head_dim, p.compress_ratio) == (head_dim, ratio)]
            assert len(chosen) == (8 * 8 if op == DECODE else 8)
            for problem in chosen:
                assert TABLE.buckets_for(problem, "triton", "any")
    assert {problem.head_dim for problem in found} <= set(HEAD_DIMS)


@BOTH_OPS
def test_a_cuda_variant_of_the_table_has_a_cluster_of_the_slices(op):
    variants = [v for v in TABLE.variants if v.op == op and v.backend == "cuda"]
    for variant in variants:
        slices = variant.problem.head_dim // variant.tuning.head_slice
        assert variant.launch.cluster == slices <= 8
    assert {variant.launch.cluster for variant in variants} >= {1, 2, 4, 8}


def cluster_variant(op: str) -> Variant:
    """Of 8 CTAs."""
    call = make(op, [(0, 1)], head_dim=512, compress_ratio=128, kv_dtype="bf16")
    return variant_of(call, "cuda", reduce_warps=8, head_slice=64)


@BOTH_OPS
@pytest.mark.parametrize("arch", ["any", "sm_80", "sm_86", "sm_89"])
def test_a_cluster_is_refused_where_not_every_gpu_has_clusters(op, arch):
    variant = cluster_variant(op)
    for call in (
        lambda: variant.check_arch(arch),
        lambda: Bucket(variant=variant, arch=arch, row=1, line=1, section=op),
    ):
        with pytest.raises(TableError) as caught:
            call()
        assert (caught.value.field, caught.value.value) == ("arch", arch)
        assert "clusters of 8 CTAs" in str(caught.value) and "sm_90" in str(caught.value)
    variant.check_arch("sm_90")


@BOTH_OPS
def test_a_cluster_of_more_ctas_than_a_gpu_has_is_refused(op):
    call = make(op, [(0, 1)], head_dim=512, compress_ratio=128)
    with pytest.raises(TableError, match="makes a cluster of 16 CTAs, more than 8") as caught:
        variant_of(call, "cuda", reduce_warps=8, head_slice=32)
    assert (caught.value.field, caught.value.legal) == ("head_slice", "64 or more")


@BOTH_OPS
def test_a_head_dim_that_no_warp_shares_is_refused(op):
    spec = op_spec(op)
    fields = {"head_dim": 64, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
    problem = spec.problem.of(fields | ({"next_n": 1} if op == DECODE else {}))
    tuning = spec.tuning(reduce_warps=8, head_slice=64)
    with pytest.raises(TableError, match="is not served; legal: 128, 256, 512"):
        Variant(problem=problem, backend="cuda", tuning=tuning)


@BOTH_OPS
def test_run_variant_refuses_a_variant_of_another_problem(op):
    call, other = small(op), small(op, kv_dtype="fp32")
    variant = variant_of(other, "triton", reduce_warps=1, head_slice=64)
    with pytest.raises(ValueError, match=r"kv_dtype fp32.*; got .*kv_dtype bf16"):
        run_variant(variant, call)


def test_next_n_of_the_call_is_the_problems():
    with pytest.raises(ValueError, match="next_n"):
        run_op(small(DECODE, next_n=17))
    run_op(small(DECODE, next_n=16))


# ---- torch.library and torch.compile -------------------------------------------------------------


@BOTH_OPS
@pytest.mark.parametrize(
    "fields",
    [
        {"outputs": ()},
        {"format": "mixed_584", "rounding": "codes_from_bf16", "layout": "packed"},
        {"outputs": ["codes_out"], "rotate": True, "format": "fp8_tensor", "scale": 0.5},
    ],
    ids=["plain", "all outputs", "scale"],
)
def test_opcheck(op, fields):
    args, kwargs = small(op, **fields).args_and_kwargs()
    torch.library.opcheck(getattr(torch.ops.kvfold, op).default, args, kwargs)


@BOTH_OPS
def test_fake_tensors_need_no_data(op):
    with torch._subclasses.FakeTensorMode() as mode:
        call = small(op)
        tensors = {
            one.name: mode.from_tensor(getattr(call, one.name))
            for one in CALLS[op].declared_tensors()
            if getattr(call, one.name) is not None
        }
        assert run_op(replace(call, **tensors)) is None


@BOTH_OPS
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_fullgraph(op, dynamic):
    """row_dtype is a torch dtype, as a model passes it."""

    def step(factor, kwargs, kv_score, *rest):
        getattr(kvfold, op)(kv_score * factor, *rest, **kwargs)
        return rest[cache] + 1

    cache = names_of(op).index("cache") - 1
    call = small(op, row_dtype="fp32")
    factor = torch.tensor(0.5, dtype=torch.bfloat16)
    halved = replace(call, kv_score=call.kv_score * factor)
    expected = by_two_ops(halved)
    args, kwargs = call.args_and_kwargs()
    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got = program(factor, kwargs, *args[:-1], torch.float32)
    assert torch.equal(got, expected.cache + 1)
    assert_is(replace(call, kv_score=halved.kv_score), expected)


@BOTH_OPS
def test_a_compiled_function_serves_other_metadata(op):
    def step(args, kwargs):
        getattr(kvfold, op)(*args, **kwargs)

    torch._dynamo.reset()
    program = torch.compile(step, fullgraph=True, backend="aot_eager")
    spans = [(3, 5), (6, 1), (0, 3)], [(2, 2), (7, 5), (1, 2)], [(9, 3), (0, 0), (10, 6)]
    for seed, prefetch in zip(range(3), PREFETCH, strict=True):
        call = make(op, spans[seed], reserve=2, outputs=ALL_OUTPUTS, seed=seed, prefetch=prefetch)
        assert call.stored().any()
        assert_is(run_copy(call, lambda one: program(*one.args_and_kwargs())), by_two_ops(call))
