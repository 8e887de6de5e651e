"""kvfold demo: a decode simulation in which every compressed row is checked."""

from typing import Annotated

import typer
from rich.table import Table as RichTable

from kvfold.bench import demo as simulation
from kvfold.bench.cli import common
from kvfold.bench.cli.common import app, clear_errors, count, option
from kvfold.bench.demo import Summary


@app.command()
@clear_errors
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to simulate.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all random numbers.")] = 0,
    device: Annotated[
        str | None, option("cpu or cuda; by default cuda where there is a GPU.")
    ] = None,
) -> None:
    """Simulate decoding with speculative tokens and check every compressed row."""
    gpu = common.current_gpu()
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; accepted: cpu, cuda")
    if device == "cuda" and gpu is None:
        raise ValueError("--device is 'cuda', but torch finds no CUDA GPU; accepted: cpu")
    device = device or ("cpu" if gpu is None else "cuda")
    with common.progress() as bar:
        task = bar.add_task("decoding", total=steps)
        summary = simulation.run(steps, device, seed, on_step=lambda: bar.advance(task))
    common.console().print(_summary(summary))
    if summary.wrong:
        common.fail(f"{count(summary.wrong, 'wrong row')}, the first at {summary.first_wrong}", 1)


def _summary(done: Summary) -> RichTable:
    """The demo's result."""
    right = "all right" if not done.wrong else f"{done.wrong} wrong"
    rows: list[tuple[str, object]] = [
        ("device", done.device),
        ("backend", done.backend),
        ("variants", "\n".join(sorted(done.variants))),
        ("steps", f"{done.steps}: {done.requests} requests, {done.tokens} drafted tokens"),
        ("rows emitted", f"{done.rows}, {done.recomputed} recomputed after a rollback: {right}"),
        ("largest error", f"{done.largest_error:.2e} against float64"),
        ("time", f"{done.seconds:.1f} s"),
    ]
    if done.replayed:
        rows.insert(4, ("CUDA graphs", f"{done.replayed} of the steps were one graph launch"))
    return common.facts(rows)
