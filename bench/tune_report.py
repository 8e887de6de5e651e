"""What `kvfold tune` measured: as a file, and as tables to look at."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table as RichTable

from kvfold.bench import report, show, tune
from kvfold.codegen import Variant
from kvfold.ops.paged_kv_compress.op import OP


@dataclass(frozen=True)
class Measured:
    """All times of one run and where they come from.

    Attributes:
        device: name of the GPU.
        environment: the rest of what `report.environment` says.
        arch: of the GPU, 'sm_90'.
        command: what to type for such a run.
        batches: the batch axis, ascending.
        families: with the times of each.
    """

    device: str
    environment: dict
    arch: str
    backend: str
    command: str
    batches: tuple[int, ...]
    families: list[tuple[tune.Family, tune.Times]]

    @property
    def origin(self) -> str:
        """What stands above the rows in a table: '<device>, <date>, <command>'."""
        return f"{self.device}, {self.environment['date'][:10]}, {self.command}"

    def choose(self, weights: Mapping[str, float]) -> list[tune.Tuned]:
        """Chooses the ranges of every family.

        Raises:
            ValueError: a scenario was not timed.
        """
        tuned = []
        for family, times in self.families:
            timed = {scenario for points in times.values() for scenario, _ in points}
            if missing := [name for name in weights if name not in timed]:
                accepted = ", ".join(sorted(timed))
                raise ValueError(f"mixture names {missing[0]}, which was not timed; timed: {accepted}")
            tuned.append(tune.Tuned(family, times, tune.choose(times, self.batches, weights)))
        return tuned

    def groups(self, arch: str) -> set[tuple]:
        """Bucket.group of every problem tuned, for rows of this arch."""
        return {(OP, self.backend, arch, *key) for family, _ in self.families for key in family.keys}


def save(measured: Measured, file: Path) -> None:
    """Writes the measurements as JSON in one step; times in microseconds."""
    content = asdict(measured) | {
        "families": [
            {
                "problem": family.problem,
                "next_n": family.next_n,
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
            for family, times in measured.families
        ]
    }
    report.write(json.dumps(content, indent=1) + "\n", file)


def load(file: Path) -> Measured:
    """Reads what `save` wrote.

    Raises:
        ValueError: the file holds no measurements.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text())
        content["families"] = [_family(one) for one in content["families"]]
        content["batches"] = tuple(content["batches"])
        return Measured(**{field.name: content[field.name] for field in fields(Measured)})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no measurements of kvfold tune ({error})") from None


def _family(content: dict) -> tuple[tune.Family, tune.Times]:
    times = {
        Variant(op=OP, **content["problem"], **one["tuning"]): {
            (time["scenario"], time["batch"]): time["median_us"] for time in one["times"]
        }
        for one in content["variants"]
    }
    return tune.Family(content["problem"], tuple(content["next_n"])), times


def times(tuned: tune.Tuned, batches: tuple[int, ...]) -> Iterator[RichTable]:
    """A family's times, one grid per scenario: of every variant that was timed everywhere.

    Those chosen are bold where they serve.
    """
    chosen = {}
    for one in tuned.ranges:
        last = one.max_batch or batches[-1]
        chosen |= {batch: one.variant for batch in batches if one.min_batch <= batch <= last}
    scenarios = dict.fromkeys(scenario for points in tuned.times.values() for scenario, _ in points)
    everywhere = [
        variant
        for variant, points in tuned.times.items()
        if len(points) == len(scenarios) * len(batches)
    ]
    for scenario in scenarios:
        title = f"{scenario}: {tuned.family}; us by batch size"
        view = show.grid(title, ["variant"], list(map(str, batches)))
        view.padding = 0
        for variant in everywhere:
            texts = (f"{tuned.times[variant][scenario, batch]:.2f}" for batch in batches)
            view.add_row(
                label(variant),
                *(
                    f"[bold green]{text}[/]" if chosen[batch] == variant else text
                    for batch, text in zip(batches, texts, strict=True)
                ),
            )
        yield view


def label(variant: Variant) -> str:
    """The end of the symbol, which says how the problem is solved: 'w8_s64'."""
    return variant.symbol.split(f"_n{variant.next_n}_")[-1]
