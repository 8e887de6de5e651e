"""kvfold demo: a simulation of prefill and decode in which every row and byte is checked."""

from typing import Annotated

import torch
import typer

from kvfold.bench import demo as simulation
from kvfold.bench.cli import common, output
from kvfold.bench.cli.common import app, option


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to simulate.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all random numbers.")] = 0,
    device: Annotated[
        str | None, option("cpu or cuda; by default cuda where there is a GPU.")
    ] = None,
) -> None:
    """Simulate prefill and decoding with rejected drafts, and check every compressed row.

    Rows go on to a cache of 584 bytes per row. All of its bytes are checked after every call.
    """
    gpu = common.current_gpu()
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device is {device!r}; accepted: cpu, cuda")
    if device == "cuda" and gpu is None:
        raise ValueError("--device is 'cuda', but torch finds no CUDA GPU; accepted: cpu")
    device = device or ("cpu" if gpu is None else "cuda")
    torch.set_num_threads(1)  # the tensors are small, so more threads are much slower
    with output.progress() as bar:
        task = bar.add_task("decoding", total=steps)
        done = simulation.run(steps, device, seed, on_step=lambda: bar.advance(task))
    right = "all right" if not done.wrong else f"{done.wrong} wrong"
    rows = {
        "device": done.device,
        "backend": done.backend,
        "variants": "\n".join(sorted(done.variants)),
        "steps": f"{done.steps}: {done.requests} requests, {done.prompt_tokens} prompt tokens"
        f" prefilled, {done.tokens} tokens drafted",
        "rows emitted": f"{done.rows}, {done.recomputed} recomputed after a rollback: {right}",
        "largest error": f"{done.largest_error:.2e} against float64",
    }
    if done.replayed:
        rows["CUDA graphs"] = f"{done.replayed} of the steps were one graph launch"
    output.console().print(output.facts(rows))
    if done.wrong:
        common.fail(f"{output.count(done.wrong, 'wrong row')}, the first at {done.first_wrong}", 1)
