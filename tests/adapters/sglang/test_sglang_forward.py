"""compress_forward against SGLang's semantics: rows, state, any plan. On a GPU, if there is one."""

import pytest
import torch
from sglang_calls import (
    as_sglang_has_it,
    assert_entries,
    assert_rows,
    assert_state,
    forward,
    make_ape,
)
from sglang_plans import Simulation, StateLayout

BF16, FP32 = torch.bfloat16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "c4-ring8": StateLayout(4, 8),
    "c4-ring16": StateLayout(4, 16),
    "c4-paged-ring8": StateLayout(4, 8, swa_page=32),
    "c4-paged-ring16": StateLayout(4, 16, swa_page=32),
    "c128-ring128": StateLayout(128, 128),
    "c128-ring256": StateLayout(128, 256),
}
DTYPES = [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)]  # of kv_score_input, of the state

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Run:
    """A simulation whose every call is checked."""

    def __init__(self, layout, head_dim=128, dtype=FP32, state_dtype=FP32, out_dtype=None, **more):
        self.simulation = Simulation(layout, head_dim, dtype=dtype, device=DEVICE, **more)
        self.state = self.simulation.state(state_dtype)
        self.ape = make_ape(self.simulation)
        self.given_ape = as_sglang_has_it(self.ape, head_dim).to(DEVICE)
        self.out_dtype = out_dtype or dtype
        # SGLang rounds the ape to the dtype of kv_score_input.
        self.rounded_ape = self.ape.to(dtype).float()
        self.closed = 0

    def check(self, call):
        before = self.state.clone()
        out = forward(self.simulation, call, self.state, self.given_ape, self.out_dtype)
        assert_entries(call)
        assert_state(self.state, before, call)
        assert_rows(self.simulation, call, out, self.rounded_ape, self.state.dtype)
        self.closed += sum(closes is not None for closes in call.closing)


def run_everything(run, steps, drafts):
    """Prompts in chunks, then decode steps or, with drafts, verify steps with rejected tokens."""
    simulation = run.simulation
    random, requests, ratio = simulation.random, simulation.requests, simulation.layout.ratio
    for shuffled in (False, True):
        counts = [random.randint(1, 5 * ratio // 2) for _ in requests]
        run.check(simulation.extend(requests, counts, shuffled=shuffled, padded=shuffled))
    for _ in range(steps):
        chosen = random.sample(requests, random.randint(1, len(requests)))
        if not drafts or random.random() < 0.2:
            run.check(simulation.decode(chosen))
            continue
        run.check(simulation.extend(chosen, [drafts] * len(chosen), shuffled=True, padded=True))
        for request in chosen:
            simulation.reject(request, random.randrange(drafts))


@each_layout
@pytest.mark.parametrize("seed", range(3))
def test_prompts_decode_and_verify_steps(layout, seed):
    drafts = 4 if layout.ring > layout.window_rows else 0
    run = Run(layout, seed=seed)
    run_everything(run, 50 if layout.ratio == 4 else 12, drafts)
    assert run.closed > (20 if layout.ratio == 4 else 2)


@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES)
@pytest.mark.parametrize("name", ["c4-ring16", "c128-ring256"])
def test_every_pair_of_dtypes(name, dtype, state_dtype):
    # On a GPU, Triton serves prompts of ratio 4 and head_dim 128 with bf16 state: other bits.
    head_dim = 512 if state_dtype == BF16 else 128
    run = Run(LAYOUTS[name], head_dim, dtype=dtype, state_dtype=state_dtype)
    run_everything(run, 8, 3)


@pytest.mark.parametrize("out_dtype", [BF16, FP32])
def test_the_output_may_have_another_dtype(out_dtype):
    run = Run(LAYOUTS["c4-ring8"], out_dtype=out_dtype)
    run_everything(run, 8, 0)


@pytest.mark.parametrize("name", ["c4-paged-ring8", "c128-ring128"])
def test_the_attention_s_head_dim(name):
    run = Run(LAYOUTS[name], head_dim=512, requests=2)
    run_everything(run, 4, 0)


@pytest.mark.parametrize("name", ["c4-ring8", "c128-ring128"])
def test_decode_alone_fills_and_closes_windows(name):
    layout = LAYOUTS[name]
    run = Run(layout, requests=2)
    for _ in range(2 * layout.ratio + 3):
        run.check(run.simulation.decode(run.simulation.requests))
    assert run.closed == 4


@pytest.mark.parametrize("ring", [8, 16])
def test_a_page_s_last_rows_are_stored_for_reuse(ring):
    """The rows at the ends of pages are in the state, and prefixes that end there go on."""
    run = Run(StateLayout(4, ring, swa_page=32), requests=2)
    simulation = run.simulation
    request, other = simulation.requests
    run.check(simulation.extend([request], [100]))
    ends = [p for p in range(96) if p % 32 >= 28]
    held = run.state.flatten(0, 1)[
        [simulation.layout.row(request.number, request.pages, p) for p in ends]
    ]
    assert not held.isnan().any()
    other.tokens, other.pages = request.tokens[:64], [*request.pages[:2], *other.pages[2:]]
    run.check(simulation.extend([other], [9]))
    run.check(simulation.decode([other]))


@each_layout
@pytest.mark.parametrize("padded", [False, True])
def test_a_call_that_closes_no_window(layout, padded):
    run = Run(layout)
    run.check(run.simulation.extend(run.simulation.requests, [1, 2, 3], padded=padded))
    assert run.closed == 0


@each_layout
def test_one_long_prompt_beside_short_ones(layout):
    run = Run(layout)
    length = 3 * layout.ratio + 1 if layout.ratio == 128 else 300
    run.check(run.simulation.extend(run.simulation.requests, [2, length, 5], shuffled=True))
    run.check(run.simulation.decode(run.simulation.requests))


@pytest.mark.parametrize("page", [-1, 12345, 2**31 - 1])
def test_the_pages_of_a_window_without_old_rows_are_not_used(page):
    run = Run(LAYOUTS["c128-ring128"])
    call = run.simulation.extend(run.simulation.requests, [300, 256, 130])
    entries = call.plan.plan_c.view(torch.int32)
    entries[:, 2:] = page
    run.check(call)
    assert run.closed == 5


@each_layout
@pytest.mark.parametrize("decode", [False, True])
def test_an_empty_batch_writes_nothing(layout, decode):
    run = Run(layout)
    call = run.simulation.decode(run.simulation.requests)
    run.check(call)
    before = run.state.clone()
    empty = [x[:0] if isinstance(x, torch.Tensor) else x for x in call.plan]
    call.plan = type(call.plan)(*empty)
    if not decode:
        call = run.simulation.extend(run.simulation.requests, [1, 1, 1])
        call.plan = type(call.plan)(
            call.plan[0], call.plan.plan_c[:0].contiguous(), call.plan.plan_w[:0].contiguous()
        )
    call.kv_score = call.kv_score[:0]
    call.closing, call.written = [], {}
    out = forward(run.simulation, call, run.state, run.given_ape, FP32)
    assert out.shape == (0, 128)
    assert_state(run.state, before, call)


def test_the_result_is_new_without_out():
    run = Run(LAYOUTS["c4-ring8"])
    call = run.simulation.extend(run.simulation.requests, [9, 4, 7])
    from kvfold.adapters import sglang

    arguments = {"head_dim": 128, "compress_ratio": 4}
    found = sglang.compress_forward(run.state, call.kv_score, run.given_ape, call.plan, **arguments)
    assert (found.shape, found.dtype) == ((4, 128), FP32)
    assert_rows(run.simulation, call, found, run.ape, FP32)
