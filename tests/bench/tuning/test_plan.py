"""What is tuned: the plan's problems, points and weights, and the command that asks for it."""

import itertools
from dataclasses import replace

import pytest

from kvfold.bench.tuning import plan as module
from kvfold.bench.tuning.plan import Plan, parse_mixture, search_of
from kvfold.bench.tuning.plan import plan as make_plan
from kvfold.codegen import TableError
from kvfold.ops.paged_kv_compress.spec import Problem
from kvfold.ops.paged_kv_compress.workload import WORKLOAD

OP = "paged_kv_compress"
DEFAULTS = dict(WORKLOAD.defaults)
PRODUCTION = Problem.of(DEFAULTS)
MIXTURE = {"all-hit": 0.45, "spread": 0.45, "no-hit": 0.1}


def plan(problem=None, **fields) -> Plan:
    return make_plan(OP, DEFAULTS | (problem or {}), **fields)


def test_families_hold_next_n_together_and_fill_in_the_defaults():
    problem = {"compress_ratio": [128, 4], "next_n": [4, 1], "kv_dtype": ["bf16", "fp32"]}
    found = plan(problem).families
    timed = [family[-1] for family in found]
    assert [(one.compress_ratio, one.overlap, one.kv_dtype) for one in timed] == [
        (128, False, "bf16"), (128, False, "fp32"), (4, True, "bf16"), (4, True, "fp32")
    ]  # fmt: skip
    # The largest next_n is timed, and the rows are for all.
    assert found[0] == [replace(PRODUCTION, next_n=n) for n in (1, 4)]
    assert [[one.next_n for one in family] for family in found] == 4 * [[1, 4]]


def test_a_family_of_one_value_is_one_problem():
    assert plan().families == [[PRODUCTION]]


def declare(monkeypatch, shared_field: str | None) -> None:
    declared = replace(search_of(OP), shared_field=shared_field)
    monkeypatch.setattr(module, "search_of", lambda op: declared)


def test_without_a_shared_field_every_problem_is_timed(monkeypatch):
    declare(monkeypatch, None)
    assert plan({"next_n": [1, 4]}).families == [[replace(PRODUCTION, next_n=n)] for n in (1, 4)]


def test_a_shared_field_that_is_left_out_has_its_default(monkeypatch):
    declare(monkeypatch, "overlap")
    assert plan().families == [[PRODUCTION]]


def test_a_plan_is_the_workloads_where_nothing_else_is_said():
    found = plan()
    assert found.sizes == list(search_of(OP).sizes)
    assert found.mixture == MIXTURE == search_of(OP).mixture
    assert found.prefetch == ["none", "metadata", "state"] == list(search_of(OP).prefetch)
    assert found.backend == "cuda"
    assert plan(backend="triton").prefetch == ["none"]
    assert plan(sizes=(8, 2, 8)).sizes == [2, 8]


def test_a_prefetch_that_the_search_does_not_weigh_is_not_tuned(monkeypatch):
    declared = replace(search_of(OP), prefetch={"none": 0.3, "state": 0.7})
    monkeypatch.setattr(module, "search_of", lambda op: declared)
    assert plan().prefetch == ["none", "state"]
    assert {at.prefetch for at in plan().points} == {"none", "state"}
    with pytest.raises(TableError, match="metadata is no prefetch of cuda; legal: none, state"):
        plan(prefetch=("metadata",))


def test_an_op_without_a_search_cannot_be_tuned(monkeypatch):
    monkeypatch.setattr(module, "workload", lambda op: replace(WORKLOAD, search=None))
    with pytest.raises(ValueError, match="paged_kv_compress declares no search"):
        plan()


@pytest.mark.parametrize(
    ("problem", "fields", "names"),
    [
        ({"head_dim": 100}, {}, "head_dim = 100"),
        ({"next_n": [4, 17]}, {}, "next_n = 17"),
        ({"kv_dtype": "fp16"}, {}, 'kv_dtype = "fp16" .*bf16, fp32'),
        ({"heads": 8}, {}, "heads is no problem field of paged_kv_compress"),
        ({}, {"sizes": (0,)}, "batch = 0"),
        ({}, {"sizes": (1 << 30,)}, "batch = 1073741824"),
        ({}, {"backend": "cpu"}, 'backend = "cpu"'),
        ({}, {"prefetch": ("early",)}, "early is no prefetch of cuda; legal: none, metadata, "),
        ({}, {"backend": "triton", "prefetch": ("state",)}, "no prefetch of triton; legal: none"),
    ],
)
def test_a_plan_refuses_what_it_cannot_tune(problem, fields, names):
    with pytest.raises(TableError, match=names):
        plan(problem, **fields)


def test_a_plan_says_what_to_type_for_it():
    found = plan({"next_n": [1, 4], "overlap": False}, sizes=(8, 2), mixture={"spread": 3.0})
    assert found.command == (
        "kvfold tune paged_kv_compress head_dim=512 compress_ratio=128 kv_dtype=bf16"
        " state_dtype=fp32 next_n=1,4 overlap=false --backend cuda --batch 2,8"
        " --prefetch none,metadata,state --mixture spread=3"
    )
    triton = plan(backend="triton").command
    assert "--backend triton" in triton and "--prefetch none " in triton


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("all-hit=1,no-hit=3", {"all-hit": 1.0, "no-hit": 3.0}),
        ("spread = 2", {"spread": 2.0}),
        ("all-hit=0.45,spread=0.45,no-hit=0.1", MIXTURE),
    ],
)
def test_a_mixture_is_weights_of_scenarios(text, weights):
    assert parse_mixture(text) == weights


@pytest.mark.parametrize(
    "text",
    ["", "spread", "spread=", "spread=x", "spread=1=2", "spread=1,spread=1", "spread=0",
     "spread=-1", "spread=inf", "spread=nan"],
)  # fmt: skip
def test_a_mixture_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"mixture is .*; accepted: weights of scenarios, as in"):
        parse_mixture(text)


@pytest.mark.parametrize("prefetch", [["none"], ["none", "state"], ["none", "metadata", "state"]])
def test_calls_with_and_without_prefetch_weigh_what_the_op_says(prefetch):
    says = search_of("paged_kv_compress").prefetch
    total = sum(says[name] for name in prefetch)
    found = plan(prefetch=prefetch, sizes=(1, 2), mixture={"spread": 3, "no-hit": 1}).points
    assert found.keys() == set(itertools.product(prefetch, ("spread", "no-hit"), (1, 2)))
    assert sum(weight for at, weight in found.items() if at.size == 2) == pytest.approx(1)
    for at, weight in found.items():
        scenario = {"spread": 0.75, "no-hit": 0.25}[at.scenario]
        assert weight == pytest.approx(scenario * says[at.prefetch] / total)
