"""A results file: what was measured, on what, with what."""

import importlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch

import kvfold
from kvfold import dispatch, nvrtc
from kvfold.bench.files import write_text

ROOT = Path(__file__).resolve().parents[1]


R = TypeVar("R", bound="Environment")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel at one point. Times in microseconds per call; None where a field does not apply.

    Attributes:
        problem: the op's problem fields.
        l2: 'cold' or 'warm'.
        variant: symbol of the kernel.
        prefetch_state: whether the calls were made with that promise.
        bytes: what a call must move.
        limit_us: the least time for so many bytes on this device.
        efficiency: limit_us / median_us.
        host_us: host time of an eager call of the op; None for a variant it did not dispatch.
        host_torch_ops_us: of the same call through torch.ops.kvfold.
        host_triton_us: of the same call of the problem's Triton kernel, by Triton's launcher.
    """

    op: str
    scenario: str
    problem: dict
    batch: int
    page_size: int
    layout: str
    l2: str
    backend: str
    variant: str
    prefetch_state: bool = False  # not in files from before there was the choice
    median_us: float
    min_us: float
    max_us: float
    bytes: int
    limit_us: float
    efficiency: float
    host_us: float | None
    # These two with a baseline only.
    host_torch_ops_us: float | None = None
    host_triton_us: float | None = None

    @property
    def dispatched(self) -> bool:
        """Whether the table chose the variant: only the op's own calls have a host time."""
        return self.host_us is not None

    @property
    def chosen_by(self) -> str:
        """'table', 'table, prefetching', 'override', or for no variant of the op 'yardstick'."""
        if self.dispatched:
            return "table, prefetching" if self.prefetch_state else "table"
        return "override" if self.variant.startswith(self.op) else "yardstick"

    @property
    def tuning(self) -> str:
        """How the problem is solved, see `tuning_of`."""
        return tuning_of(self.variant, self.problem["next_n"])

    @property
    def panel(self) -> tuple:
        """What the rows of one table have in common: problem, scenario, page size, layout."""
        return *self.problem.values(), self.scenario, self.page_size, self.layout


def tuning_of(symbol: str, next_n: int) -> str:
    """The end of a variant's symbol, which says how the problem is solved: 'w8_s64'."""
    return symbol.split(f"_n{next_n}_")[-1]


@dataclass(frozen=True)
class Environment:
    """Where a run's measurements come from, see `environment`."""

    device: str
    driver: str | None
    versions: dict[str, str | None]
    date: str
    commit: str | None
    config_fingerprint: str


@dataclass(frozen=True)
class Report(Environment):
    """All rows of one run and where they come from; bandwidths in GB/s of 1e9 bytes."""

    read_bandwidth_gbs: float
    copy_bandwidth_gbs: float
    empty_node_us: float
    rows: list[Row]


def extended(report: Report, rows: list[Row]) -> Report:
    """The report with rows of another run added.

    Raises:
        ValueError: the two were not measured on the same device with the same code.
    """
    here = environment(torch.device("cuda", torch.cuda.current_device()))
    for name in here.keys() - {"date"}:
        if here[name] != getattr(report, name):
            raise ValueError(f"{name} is {here[name]!r} here, {getattr(report, name)!r} there")
    return replace(report, rows=[*report.rows, *rows])


def save(report: Environment, file: Path) -> None:
    """Writes a report as JSON in one step."""
    rounded = json.loads(json.dumps(asdict(report)), parse_float=lambda text: round(float(text), 4))
    write_text(json.dumps(rounded, indent=1) + "\n", file)


def load(file: Path) -> Report:
    """Reads what `save` wrote. Raises as `load_as` does."""
    return load_as(Report, Row, "bench", file)


def load_as(report_type: type[R], row_type: type, command: str, file: Path) -> R:
    """Reads what `save` wrote of a report that `kvfold COMMAND` made.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text())
        rows = [row_type(**row) for row in content.pop("rows")]
        return report_type(**content, rows=rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no results file of kvfold {command} ({error})") from None


def environment(device: torch.device) -> dict:
    """The fields of an Environment: of this device, this machine and this code, now."""
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "versions": _versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "config_fingerprint": dispatch.table().fingerprint,
    }


def commit() -> str | None:
    """KVFOLD_COMMIT, else the checkout's commit, '-dirty' if it is changed; None if no checkout."""
    if given := os.environ.get("KVFOLD_COMMIT"):
        return given
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head or not top or Path(top).resolve() != ROOT:
        return None  # no checkout, or another project's that kvfold is installed inside of
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return f"{head}-dirty" if changed else head


def _versions() -> dict[str, str | None]:
    return {
        "kvfold": kvfold.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cupy": _version("cupy"),
        "nvrtc": nvrtc.version() if nvrtc.available() is None else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


def _version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def _driver() -> str | None:
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return drivers.splitlines()[0] if drivers else None


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
