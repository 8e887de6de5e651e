"""Small reports of every kind, as a run on a GPU would make them."""

from dataclasses import replace

from kvfold.bench.records import KernelReport, KernelRow, StepReport, StepRow
from kvfold.bench.step.modes import MODES, OFFLOADS
from kvfold.bench.tuning.plan import Plan
from kvfold.bench.tuning.report import TunedTime, TunedVariant, TuneReport

OP = "paged_kv_compress"
PROBLEM = {
    "head_dim": 512, "compress_ratio": 128, "overlap": False, "kv_dtype": "bf16",
    "state_dtype": "fp32", "next_n": 4,
}  # fmt: skip
ENVIRONMENT = {
    "device": "a GPU",
    "driver": "580.1",
    "versions": {"kvfold": "0.1.0", "cupy": None},
    "date": "2026-11-21T09:00:00+00:00",
    "commit": "0123abc-dirty",
    "table_fingerprint": "0123456789abcdef",
}


def kernel_row(scenario: str, size: int, median: float, tuning: str, **changes) -> KernelRow:
    row = KernelRow(
        op=OP,
        scenario=scenario,
        size=size,
        problem=PROBLEM,
        options={"page_size": 32, "layout": "split", "output_dtype": "bf16"},
        l2="cold",
        backend="cuda",
        variant=f"{OP}_hd512_r128_bf16_fp32_n4_{tuning}",
        chosen_by="table",
        prefetch="none",
        median_us=median,
        min_us=0.9 * median,
        max_us=1.2 * median,
        moved_bytes=1 << 20,
        limit_us=0.5 * median,
        efficiency=0.5,
        host_us={},
    )
    return replace(row, **changes)


def _kernel_rows():
    for scenario in ("all-hit", "no-hit"):
        for size in (1, 128):
            host_us = {"call": 17.123456789, "triton": 30.0}
            yield kernel_row(scenario, size, 2 + size / 7, "w8_s64", host_us=host_us)
            yield kernel_row(scenario, size, 20 + size / 3, "w1_s64", chosen_by="override")
            yield kernel_row(scenario, size, 1 + size / 7, "w8_s64", prefetch="state")
            yardstick = kernel_row(scenario, size, 60 + size / 3, "", chosen_by="yardstick")
            yield replace(yardstick, variant="row_by_row")


KERNELS = KernelReport(
    **ENVIRONMENT,
    read_bandwidth_gbs=4700.0,
    copy_bandwidth_gbs=4260.0,
    empty_node_us=0.52,
    rows=list(_kernel_rows()),
)

STEP = StepReport(
    **ENVIRONMENT,
    rows=[
        StepRow(
            mode=name,
            problem={"layers": 61, "hidden": 7168, "head_dim": 512, "next_n": 4},
            batch=batch,
            median_us=1000.5 / (n + 1),
            min_us=900.0 / (n + 1),
            max_us=1100.0,
            host_us=1800.0 / (n + 1) ** 2,
            device_us=400.0,
            copy_us=5000.0 if name == OFFLOADS else None,
            synchronisations=n,
        )
        for batch in (16, 256)
        for n, name in enumerate(MODES)
    ],
)


def _tuned(reduce_warps: int, us: float) -> TunedVariant:
    return TunedVariant(
        problem=PROBLEM,
        tuning={"reduce_warps": reduce_warps, "head_slice": 32, "min_ctas": 1},
        times=[
            TunedTime(prefetch=prefetch, scenario=scenario, size=size, median_us=us * size)
            for prefetch in ("none", "state")
            for scenario in ("all-hit", "spread")
            for size in (1, 16)
        ],
    )


TUNING = TuneReport(
    **ENVIRONMENT,
    arch="sm_90",
    plan=Plan(
        op=OP,
        problem={name: [value] for name, value in PROBLEM.items()} | {"next_n": [1, 4]},
        backend="cuda",
        sizes=[1, 16],
        mixture={"all-hit": 0.75, "spread": 0.25},
        prefetch=["none", "state"],
    ),
    rows=[_tuned(4, 1.0), _tuned(8, 1.25)],
)
