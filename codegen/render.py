"""CUDA source from the table: config structs, parameter structs and kernel instantiations."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from .fields import Field, Value
from .spec import OpSpec, op_spec
from .table import Table
from .variant import Variant

_C_TYPES = {"bf16": "bf16", "fp32": "float"}


@dataclass(frozen=True)
class Rendered:
    """What a table generates.

    Attributes:
        instantiations: CUDA source, one kernel per cuda variant.
        headers: include name -> text of the generated headers that it includes.
        fingerprint: the table's.
    """

    instantiations: str
    headers: dict[str, str]
    fingerprint: str


def render(table: Table) -> Rendered:
    """Generates the source of every cuda variant of a table."""
    variants = [variant for variant in table.variants if variant.backend == "cuda"]
    ops = dict.fromkeys(variant.op for variant in variants)
    return Rendered(
        instantiations=_instantiations(variants, table.fingerprint),
        headers={params_header(op): params_source(op_spec(op)) for op in ops},
        fingerprint=table.fingerprint,
    )


def instantiate(variant: Variant) -> str:
    """CUDA source of one cuda variant; the same whatever the table holds besides it.

    Raises:
        ValueError: the variant is of another backend.
    """
    if variant.backend != "cuda":
        raise ValueError(f"variant {variant.symbol} has backend {variant.backend}; accepted: cuda")
    return _instantiations([variant], None)


def params_header(op: str) -> str:
    """Include name of the header that declares an op's parameter struct."""
    return f"ops/{op}/params.cuh"


def params_source(spec: OpSpec) -> str:
    """That header's text."""
    return _template("params.cuh.j2").render(spec=spec, struct=spec.param_struct)


def _instantiations(variants: Iterable[Variant], fingerprint: str | None) -> str:
    return _template("instantiations.cu.j2").render(
        variants=variants, fingerprint=fingerprint, members=config_members
    )


def config_members(variant: Variant) -> list[str]:
    """The members of a variant's config struct, as C++ declarations."""
    members = []
    for fields in (variant.problem, variant.tuning):
        members += [_member(field, getattr(fields, field.name)) for field in fields.fields()]
    members.append(f"static constexpr int threads = {variant.launch.threads};")
    members.append(f"static constexpr int shared_bytes = {variant.launch.shared_bytes};")
    members.append(f"static constexpr int cluster = {variant.launch.cluster};")
    constants = {**variant.launch.constants, **variant.spec.constants, **dict(variant.constants)}
    for name, value in constants.items():
        members.append(f"static constexpr {type(value).__name__} {name} = {str(value).lower()};")
    return members


def _member(field: Field, value: Value) -> str:
    if field.kind == "dtype":
        return f"using {field.name} = {_C_TYPES[str(value)]};"
    return f"static constexpr {field.kind} {field.name} = {str(value).lower()};"


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
