"""Tables of an op's fields and arguments, from its declaration, for command line and README."""

from collections.abc import Iterator, Sequence

from .arguments import TensorArgument
from .errors import in_words
from .fields import Field
from .spec import BACKENDS, OpSpec


def field_rows(spec: OpSpec) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, kind, legal values, default, meaning) of every field that a row may have."""
    low, high = spec.bounds
    for kind, fields in (("problem", spec.problem.fields()), ("tuning", spec.tuning.fields())):
        for field in fields:
            yield field.name, kind, in_words(field.legal), _default(field), field.help
    yield (
        "backend",
        "tuning",
        in_words(BACKENDS),
        "",
        "cuda: compiled by NVRTC; triton: for GPUs without it",
    )
    yield (
        low,
        "applicability",
        "1 or more",
        "1",
        f"the smallest {spec.axis} served: {spec.axis_help}",
    )
    yield high, "applicability", f"{low} or more", "no bound", f"the largest {spec.axis} served"
    yield "arch", "applicability", "any, sm_90, ...", "any", "the only GPU architecture served"


def argument_rows(spec: OpSpec) -> Iterator[tuple[str, str, str, str]]:
    """(name, shape, dtype or accepted words, meaning) of every argument of the torch op."""
    for one in spec.arguments.declared():
        if isinstance(one, TensorArgument):
            mutated = ", mutated" if one.mutated else ""
            dtype = f"as `{one.like}`" if one.like else ", ".join(one.dtypes)
            yield f"`{one.name}`{mutated}", one.shape_text, dtype, one.help
        else:
            default = "" if one.default is None else f" = {_literal(one.default)}"
            values = ", ".join(map(_literal, one.choices)) or one.type.__name__
            yield f"`{one.name}`{default}", "", values, one.help


def markdown(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _default(field: Field) -> str:
    if field.default is None:
        return ""
    return "see meaning" if callable(field.default) else str(field.default).lower()
