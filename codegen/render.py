"""The table as source: the CUDA instantiations and the dispatcher, from one list of buckets."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from .table import Table
from .variant import Variant


@dataclass(frozen=True)
class Rendered:
    """What a table generates; both texts bear its fingerprint.

    Attributes:
        instantiations: CUDA source, one kernel per cuda variant.
        dispatch: Python source; defines FINGERPRINT, BUCKETS and
            select(op, backend, arch, key, batch) -> symbol or None.
        fingerprint: the table's.
    """

    instantiations: str
    dispatch: str
    fingerprint: str


def render(table: Table) -> Rendered:
    """Generates both sources of a table in one pass over its buckets."""
    cuda, groups = {}, {}
    for group, buckets in table.groups.items():
        groups[group] = [(bucket.max_batch, bucket.variant.symbol) for bucket in buckets]
        cuda.update((b.variant, None) for b in buckets if b.variant.backend == "cuda")
    return Rendered(
        instantiations=_template("instantiations.cu.j2").render(
            variants=cuda, fingerprint=table.fingerprint
        ),
        dispatch=_template("dispatch.py.j2").render(groups=groups, fingerprint=table.fingerprint),
        fingerprint=table.fingerprint,
    )


def instantiate(variant: Variant) -> str:
    """CUDA source of one cuda variant, in a table or not; the same whatever else a table holds."""
    if variant.backend != "cuda":
        raise ValueError(f"variant {variant.symbol} has backend {variant.backend}; accepted: cuda")
    return _template("instantiations.cu.j2").render(variants=[variant], fingerprint=None)


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["ctype"] = {"bf16": "bf16", "fp32": "float"}.__getitem__
    return environment.get_template(name)
