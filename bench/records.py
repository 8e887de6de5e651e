"""Results files: the one module that writes, reads and validates them.

A file holds one report: one run of one command, with its environment. A report is a dataclass, and
its file is that dataclass as JSON. README and docs quote the files committed in bench/results/.
"""

import dataclasses
import json
import types
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from kvfold.codegen import op_spec
from kvfold.codegen.errors import shortened
from kvfold.codegen.fields import POSITIVE, Value, check_value
from kvfold.runtime.files import replace_file
from kvfold.workload import workload

DIGITS = 4  # kept of a float, after the point


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every results file has.

    Attributes:
        KIND: which command writes it; in a file, `kind`.
        device: name of the GPU.
        driver: version of the GPU's driver.
        versions: package -> version.
        date: UTC, ISO 8601.
        commit: of the checkout, '-dirty' if it had changes; None without a checkout.
        table_fingerprint: of the table in force.
    """

    KIND: ClassVar[str]

    device: str
    driver: str | None
    versions: dict[str, str | None]
    date: str
    commit: str | None
    table_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class LimitReport(Report):
    """What a results file has that compares times with the limit.

    Attributes:
        read_bandwidth_gbs, copy_bandwidth_gbs: measured in the run, GB/s of 1e9 bytes.
        empty_node_us: what an empty kernel costs as a node of a graph.
    """

    read_bandwidth_gbs: float
    copy_bandwidth_gbs: float
    empty_node_us: float


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One kernel at one point. Times are microseconds per call.

    Attributes:
        op, scenario, size: the point; size is on the op's axis.
        problem: the op's problem fields.
        options: the case's other fields, as page_size.
        l2: 'cold', or 'warm' where memory holds too few cases to make the L2 cold.
        backend: of the kernel.
        variant: symbol of the kernel, or name of a yardstick.
        chosen_by: 'table', 'override' or 'yardstick'.
        prefetch: how the calls were made, a name of the workload's prefetch.
        median_us, min_us, max_us: over the replays.
        moved_bytes: that a call must move.
        limit_us: the least time for so many bytes on this device.
        efficiency: limit_us / median_us.
        host_us: host time of an eager call, by how it is made: 'call' is the Python function,
            'torch_ops' the same through torch.ops, 'unrepeated' a call that no earlier call helps,
            'triton' Triton's own launcher. Empty if it was not measured.
    """

    op: str
    scenario: str
    size: int
    problem: dict[str, Value]
    options: dict[str, Value]
    l2: str
    backend: str
    variant: str
    chosen_by: str
    prefetch: str
    median_us: float
    min_us: float
    max_us: float
    moved_bytes: int
    limit_us: float
    efficiency: float
    host_us: dict[str, float]

    def __post_init__(self):
        op_spec(self.op).problem.of(self.problem)
        workload(self.op).options.of(self.options)
        check_value("size", self.size, POSITIVE)
        check_value("l2", self.l2, ("cold", "warm"))
        check_value("chosen_by", self.chosen_by, ("table", "override", "yardstick"))

    @property
    def panel(self) -> tuple[str, ...]:
        """What the rows of one table of times have in common."""
        return self.op, self.described, self.scenario

    @property
    def described(self) -> str:
        """The problem, the options and the L2 in words."""
        fields = (self.problem | self.options).items()
        return f"{', '.join(f'{name} {str(v).lower()}' for name, v in fields)}; {self.l2} L2"

    @property
    def tuning(self) -> str:
        """The end of the variant's symbol, which says how the problem is solved: 'w8_s64'."""
        problem = op_spec(self.op).problem.of(self.problem)
        return self.variant.removeprefix("_".join([self.op, *problem.symbol_parts()]) + "_")


@dataclass(frozen=True, kw_only=True)
class KernelReport(LimitReport):
    """What `kvfold bench` writes."""

    KIND = "kernels"

    rows: list[KernelRow]


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One mode of running a decode step. Times are microseconds per step.

    Attributes:
        mode: name of the mode.
        problem: what the model is made of.
        batch: requests in the step.
        median_us, min_us, max_us: wall time of a step among many in a row.
        host_us: host time of a step until its last launch, with an empty queue before it.
        device_us: sum of the durations of its kernels, by a profile of many steps in a row. The
            time in which two kernels overlap counts twice.
        copy_us: time of the states' copies alone, both directions at once; None for modes that
            leave the states on the device.
        synchronisations: times that the host waited for the device in a step, rounded up.
    """

    mode: str
    problem: dict[str, int]
    batch: int
    median_us: float
    min_us: float
    max_us: float
    host_us: float
    device_us: float
    copy_us: float | None
    synchronisations: int

    def __post_init__(self):
        check_value("batch", self.batch, POSITIVE)


@dataclass(frozen=True, kw_only=True)
class StepReport(Report):
    """What `kvfold step` writes."""

    KIND = "step"

    rows: list[StepRow]


@dataclass(frozen=True, kw_only=True)
class ModelStepRow:
    """The compressors of a pair of layers in one decode step. Times are microseconds per pair.

    Attributes:
        next_n: new tokens of each request.
        batch: requests in the step.
        prefetch: of the calls.
        pairs: that were timed one after the other, each with a state of its own.
        median_us, min_us, max_us: over the replays.
        alone_us: compressor -> time of its calls alone.
        variants: compressor -> symbol of its kernel.
        limit_us: the sum of the calls' least times on this device.
    """

    next_n: int
    batch: int
    prefetch: str
    pairs: int
    median_us: float
    min_us: float
    max_us: float
    alone_us: dict[str, float]
    variants: dict[str, str]
    limit_us: float

    def __post_init__(self):
        check_value("batch", self.batch, POSITIVE)


@dataclass(frozen=True, kw_only=True)
class ModelStepReport(LimitReport):
    """What `kvfold bench model-step` writes."""

    KIND = "model-step"

    rows: list[ModelStepRow]


@dataclass(frozen=True, kw_only=True)
class TransformersRow:
    """A decode step of a model of transformers. Times are milliseconds per step.

    Attributes:
        batch: sequences.
        context: tokens per sequence before the step.
        step_ms: how the model runs -> the whole step.
        compressors_ms: how it runs -> the calls of its compressors, projections, indexer and
            waits for the host included.
    """

    batch: int
    context: int
    step_ms: dict[str, float]
    compressors_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TransformersReport(Report):
    """What `kvfold bench transformers` writes.

    Attributes:
        experts: of a layer.
    """

    KIND = "transformers"

    experts: int
    rows: list[TransformersRow]


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """A call of an engine through its adapter. Times are microseconds of the host.

    Attributes:
        engine: the adapter.
        call: what the engine calls.
        adapter_us: the call.
        ops_us: the bare calls of kvfold's ops that the adapter makes.
    """

    engine: str
    call: str
    adapter_us: float
    ops_us: float


@dataclass(frozen=True, kw_only=True)
class AdapterReport(Report):
    """What `kvfold bench adapters` writes."""

    KIND = "adapters"

    rows: list[AdapterRow]


# ---- files ---------------------------------------------------------------------------------------

R = TypeVar("R", bound=Report)


def save(report: Report, file: Path) -> None:
    """Writes a report in one step."""
    text = json.dumps({"kind": report.KIND, **asdict(report)})
    content = json.loads(text, parse_float=lambda x: round(float(x), DIGITS))
    replace_file(file, (json.dumps(content, indent=1) + "\n").encode())


def load(report_type: type[R], file: Path) -> R:
    """Reads a report that `save` wrote.

    Raises:
        ValueError: the file holds no such report; the message names the place.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(file.read_bytes())
        kind = content.pop("kind", None) if isinstance(content, dict) else None
        _require(kind == report_type.KIND, kind, ".kind", report_type.KIND)
        return _decode(content, report_type, "")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no {report_type.KIND} results file: {error}") from None


def _decode(value: Any, wanted: Any, place: str) -> Any:
    """The value as the wanted type. Raises ValueError that names the place of what is wrong."""
    origin, parameters = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _decode_record(value, wanted, place)
    if origin is list:
        _require(isinstance(value, list) and value, value, place, "a list of one value or more")
        return [_decode(item, parameters[0], f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, dict), value, place, "an object")
        return {
            _decode(k, str, place): _decode(v, parameters[1], f"{place}.{k}")
            for k, v in value.items()
        }
    accepted: tuple[Any, ...] = parameters if origin is types.UnionType else (wanted,)
    words = " or ".join("null" if t is types.NoneType else str(t.__name__) for t in accepted)
    if float in accepted and type(value) in (int, float):
        # Every float is a time, a bandwidth, a weight or a ratio.
        _require(0 < value < 1e30, value, place, "a positive number")
        return float(value)
    _require(type(value) in accepted, value, place, words)
    if type(value) is int:
        _require(abs(value) < 2**63, value, place, "an int of 64 bits")
    if type(value) is str:
        _require(value.isprintable(), value, place, "printable text")
    return value


def _decode_record(value: Any, wanted: type, place: str) -> Any:
    """An object of JSON as an instance of a dataclass."""
    _require(isinstance(value, dict), value, place, "an object")
    hints = typing.get_type_hints(wanted)
    names = [field.name for field in dataclasses.fields(wanted)]
    _require(value.keys() == set(names), sorted(value), place, f"the names {', '.join(names)}")
    fields = {name: _decode(value[name], hints[name], f"{place}.{name}") for name in names}
    try:
        return wanted(**fields)
    except ValueError as error:
        raise ValueError(f"{place.lstrip('.')}: {error}" if place else str(error)) from None


def _require(condition: object, value: Any, place: str, accepted: str) -> None:
    if not condition:
        where = place.lstrip(".") or "it"
        raise ValueError(f"{where} is {shortened(value)}; accepted: {accepted}")
