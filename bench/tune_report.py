"""What `kvfold tune` measured: as a file, and as tables to look at."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from rich.table import Table as RichTable

from kvfold.bench import show, tune
from kvfold.bench.files import write_text
from kvfold.bench.report import Environment, tuning_of
from kvfold.codegen import Variant


@dataclass(frozen=True)
class Measured(Environment):
    """All times of one run and where they come from.

    Attributes:
        arch: of the GPU, as 'sm_90'.
        plan: what was to be measured.
        times: of each of its families.
    """

    arch: str
    plan: tune.Plan
    times: list[tune.Times]

    @property
    def origin(self) -> str:
        """Where rows come from: '<device>, <date>, <command>'."""
        return f"{self.device}, {self.date[:10]}, {self.plan.command}"

    def choose(self, weights: Mapping[str, float], arch: str) -> list[tune.Tuned]:
        """Chooses the ranges of every family, for rows of this arch.

        Raises:
            ValueError: a scenario was not timed.
        """
        for name in weights:
            if name not in self.plan.scenarios:
                timed = ", ".join(self.plan.scenarios)
                raise ValueError(f"mixture names {name}, which was not timed; accepted: {timed}")
        return [
            tune.Tuned(family, times, tune.choose(times, self.plan.batches, weights, arch))
            for family, times in zip(self.plan.families, self.times, strict=True)
        ]


def save(measured: Measured, file: Path) -> None:
    """Writes the measurements as JSON in one step."""
    parts = {field.name: getattr(measured, field.name) for field in fields(Measured)}
    plan = {field.name: getattr(measured.plan, field.name) for field in fields(tune.Plan)}
    families = [
        {
            "problem": family.problem,
            "variants": [
                {
                    "variant": variant.symbol,
                    "tuning": variant.tuning,
                    "times": [
                        {"scenario": scenario, "batch": batch, "median_us": round(us, 4)}
                        for (scenario, batch), us in points.items()
                    ],
                }
                for variant, points in times.items()
            ],
        }
        for family, times in zip(measured.plan.families, measured.times, strict=True)
    ]
    content = parts | {"plan": plan, "times": families}
    write_text(json.dumps(content, indent=1) + "\n", file)


def load(file: Path) -> Measured:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file holds no measurements.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text())
        plan = content.pop("plan")
        lists = {name: tuple(plan.pop(name)) for name in ("batches", "scenarios")}
        problems = {name: tuple(values) for name, values in plan.pop("problems").items()}
        plan = tune.Plan(problems=problems, **lists, **plan)
        times = [_times(plan.op, one) for one in content.pop("times")]
        return Measured(**content, plan=plan, times=times)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no measurements of kvfold tune ({error})") from None


def _times(op: str, family: dict) -> tune.Times:
    return {
        Variant(op=op, **family["problem"], **one["tuning"]): {
            (time["scenario"], time["batch"]): time["median_us"] for time in one["times"]
        }
        for one in family["variants"]
    }


def times(tuned: tune.Tuned, plan: tune.Plan) -> Iterator[RichTable]:
    """A family's times, one grid per scenario: of every variant that was timed everywhere.

    Those chosen are bold where they serve.
    """
    batches, chosen = plan.batches, {}
    for one in tuned.ranges:
        last = one.max_batch or batches[-1]
        chosen |= {batch: one.variant for batch in batches if one.min_batch <= batch <= last}
    count = len(batches) * len(plan.scenarios)
    everywhere = [variant for variant, points in tuned.times.items() if len(points) == count]
    for scenario in plan.scenarios:
        title = f"{scenario}: {tuned.family}; us by batch size"
        view = show.grid(title, ["variant"], list(map(str, batches)))
        view.padding = 0
        for variant in everywhere:
            texts = (f"{tuned.times[variant][scenario, batch]:.2f}" for batch in batches)
            view.add_row(
                tuning_of(variant.symbol, variant.next_n),
                *(
                    f"[bold]{text}[/]" if chosen[batch] == variant else text
                    for batch, text in zip(batches, texts, strict=True)
                ),
            )
        yield view
