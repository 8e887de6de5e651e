"""The tuner's times as a results file, and the choice made from them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvfold.bench.records import (
    TunedFamily,
    TunedTime,
    TunedVariant,
    TuneReport,
    environment,
    load,
)
from kvfold.bench.tuning import search
from kvfold.bench.tuning.search import Family, Plan, TimePoint, Times, Tuned
from kvfold.codegen import Bucket, OpSpec, Variant, op_spec
from kvfold.codegen.fields import check_names
from kvfold.runtime import dispatch
from kvfold.workload import Search, workload


def report(plan: Plan, times: Sequence[Times], device: torch.device) -> TuneReport:
    """All times of a run."""
    families = [
        TunedFamily(
            problem=family.problem.values(),
            shared=list(family.shared),
            variants=[
                TunedVariant(
                    tuning=variant.tuning.values(),
                    times=[TunedTime(**at._asdict(), median_us=us) for at, us in points.items()],
                )
                for variant, points in found.items()
            ],
        )
        for family, found in zip(plan.families, times, strict=True)
    ]
    return TuneReport(
        **environment(TuneReport, device),
        op=plan.op,
        arch=dispatch.arch_of(device),
        backend=plan.backend,
        command=plan.command,
        mixture=dict(plan.mixture),
        prefetch=list(plan.prefetch),
        sizes=list(plan.sizes),
        families=families,
    )


def read(file: Path) -> tuple[TuneReport, Plan, list[Times]]:
    """A results file, the plan that it is of, and its times. Raises as records.load does."""
    found = load(TuneReport, file)
    try:
        spec, work = op_spec(found.op), workload(found.op)
        check_names(found.mixture, work.scenarios, "scenario")
        check_names(found.prefetch, work.prefetch, "prefetch")
        families = [_family(spec, search.search_of(work), one) for one in found.families]
        times = [
            {_variant(found, family, one): _points(one) for one in entry.variants}
            for family, entry in zip(families, found.families, strict=True)
        ]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    plan = Plan(
        op=found.op,
        families=tuple(families),
        backend=found.backend,
        sizes=tuple(found.sizes),
        mixture=found.mixture,
        prefetch=tuple(found.prefetch),
        command=found.command,
    )
    return found, plan, times


def _family(spec: OpSpec, declared: Search, one: TunedFamily) -> Family:
    problem, name = spec.problem.of(one.problem), declared.shared_field
    largest = [] if name is None else [getattr(problem, name)]
    if one.shared[-1:] != largest or one.shared != sorted(set(one.shared)):
        accepted = "values of the shared field, ascending to that of problem"
        raise ValueError(f"shared is {one.shared}; accepted: {accepted}")
    return Family(problem, name, tuple(one.shared))


def _variant(found: TuneReport, family: Family, one: TunedVariant) -> Variant:
    tuning = op_spec(found.op).tuning.of(one.tuning)
    return Variant(problem=family.problem, backend=found.backend, tuning=tuning)


def _points(one: TunedVariant) -> dict[TimePoint, float]:
    return {TimePoint(t.prefetch, t.scenario, t.size): t.median_us for t in one.times}


def choose(plan: Plan, times: Sequence[Times]) -> list[Tuned]:
    """The ranges of every family."""
    return [
        Tuned(family, found, search.choose(found, plan))
        for family, found in zip(plan.families, times, strict=True)
    ]


def buckets(tuned: Sequence[Tuned], arch: str) -> list[Bucket]:
    """The ranges as buckets of a table, for every problem of each family."""
    return [
        Bucket(
            variant=replace(one.variant, problem=problem),
            min_size=one.min_size,
            max_size=one.max_size,
            arch=arch,
            row=0,
            line=0,
            section="tuned",
        )
        for entry in tuned
        for problem in entry.family.problems()
        for one in entry.ranges
    ]
