"""What `kvfold bench` measures beside the ops: parts of a step, in an engine or of one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from kvfold.bench import records
from kvfold.bench.cli import adapters, common, model_step, output, transformers_step
from kvfold.bench.cli.words import integers


class Step(Protocol):
    """A module of bench/cli for one of them.

    Attributes:
        NAME: what the command line calls it.
        REPORT: class of its results files.
        TAKES: the options that it takes, beside --json and --from.
    """

    NAME: str
    REPORT: type[records.Report]
    TAKES: frozenset[str]

    def without_gpu(self) -> None:
        """Says what is done where nothing can be timed, and does it."""
        ...

    def measure(
        self,
        sizes: tuple[int, ...] | None,
        prefetch: str | None,
        device: torch.device,
        started: Callable[[str], None],
    ) -> Any:
        """Measures, and calls `started` with each point before. Returns a REPORT."""
        ...

    def show(self, report: Any, plot: Path | None) -> None:
        """Prints a report, and draws it."""
        ...


STEPS: dict[str, Any] = {one.NAME: one for one in (model_step, transformers_step, adapters)}


def run(step: Step, given: Mapping[str, Any], json_file: Path | None, source: Path | None) -> None:
    """Measures, prints, and writes the files that are asked for; or shows a results file.

    Args:
        given: the values of all other options, by name.
    """
    taken = {name: value for name, value in given.items() if name in step.TAKES}
    common.refuse(
        {name: value for name, value in given.items() if name not in taken},
        f"{step.NAME} has none",
    )
    sizes, prefetch, plot = (taken.get(name) for name in ("--size", "--prefetch", "--plot"))
    common.check_plot(plot)
    if source is not None:
        measured = {"--size": sizes, "--prefetch": prefetch, "--json": json_file}
        common.refuse(measured, "--from measures nothing")
        step.show(records.load(step.REPORT, source), plot)
        return
    common.check_writable(json_file)
    counts = integers("--size", sizes)
    device = common.current_gpu()
    if device is None:
        common.refuse({"--json": json_file, "--plot": plot}, common.NO_GPU)
        step.without_gpu()
        return
    with output.progress() as bar:
        task = bar.add_task("beginning", total=None)
        report = step.measure(
            counts, prefetch, device, lambda what: bar.update(task, description=what)
        )
    if json_file is not None:
        records.save(report, json_file)
    step.show(report, plot)
