"""Tables of fields and arguments, and pictures of pages, for the command line and the documents."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from .arguments import TensorArgument
from .errors import in_words
from .fields import Field
from .formats import CacheFormat, PageLayout
from .spec import BACKENDS, OpSpec


def field_rows(spec: OpSpec) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, kind, legal values, default, meaning) of every field that a row may have."""
    low, high = spec.bounds
    for kind, fields in (("problem", spec.problem.fields()), ("tuning", spec.tuning.fields())):
        yield from (_field_row(field, kind) for field in fields)
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
        f"the smallest number of {spec.axis_help} that the row serves",
    )
    most = f"the largest number of {spec.axis_help} that the row serves"
    yield high, "applicability", f"{low} or more", "no bound", most
    yield (
        "arch",
        "applicability",
        "any, sm_90, ...",
        "any",
        "the only GPU architecture that the row serves",
    )


def format_field_rows() -> Iterator[tuple[str, str, str, str, str]]:
    """The same of every field that a cache format may have."""
    yield from (_field_row(field, "format") for field in CacheFormat.fields())


def page_picture(layouts: Sequence[PageLayout]) -> str:
    """A page to the byte, a line for each part of a row; two columns for each layout.

    Args:
        layouts: of one format, with equal rows_per_page; they differ in head_dim.
    """
    heads = ["".join(f"{f'head_dim {one.head_dim}':>18}" for one in layouts)]
    heads.append(f"{'start':>9}{'bytes':>9}" * len(layouts))
    lines = []
    for parts in zip(*map(_page_parts, layouts), strict=True):
        if any(length for _, length, _ in parts):
            places = "".join(f"{start:>9}{length:>9}" for start, length, _ in parts)
            lines.append(f"{places}   {parts[0][2]}")
    ends = "".join(f"{one.page_bytes:>9}{'':>9}" for one in layouts)
    return "\n".join([*heads, *lines, f"{ends}   end of the page"])


def _page_parts(layout: PageLayout) -> Iterator[tuple[int, int, str]]:
    """(start, bytes, what) of the parts of a page: of row 0 each, then one per region."""
    last = layout.rows_per_page - 1
    start, behind = layout.data_offset(0), layout.code_bytes
    yield start, behind, f"row 0: codes, {layout.format.code}"
    yield start + behind, layout.data_bytes - behind, f"row 0: last {layout.rope_dim} columns, bf16"
    if not layout.interleaved:
        yield from _other_rows(layout.data_offset, layout.row_stride, last)
    start, used = layout.scale_offset(0), layout.scale_count * layout.format.scale_width
    yield start, used, f"row 0: scales, {layout.format.scale}"
    yield start + used, layout.scale_bytes - used, "row 0: zeros"
    if layout.interleaved:
        yield from _other_rows(layout.data_offset, layout.row_stride, last)
    else:
        yield from _other_rows(layout.scale_offset, layout.scale_stride, last)


def _other_rows(
    offset: Callable[[int], int], length: int, last: int
) -> Iterator[tuple[int, int, str]]:
    """The second and the last row of a region."""
    yield offset(1), length, "row 1, and so on"
    yield offset(last), length, f"row {last}"


def argument_rows(spec: OpSpec) -> Iterator[tuple[str, str, str, str]]:
    """(name, shape, dtype or accepted words, meaning) of every argument of the torch op."""
    for one in spec.arguments.declared():
        if isinstance(one, TensorArgument):
            notes = (", mutated" if one.mutated else "") + (", or None" if one.optional else "")
            dtype = f"as `{one.like}`" if one.like else ", ".join(one.dtypes)
            yield f"`{one.name}`{notes}", one.shape_text, dtype, one.help
        else:
            default = "" if one.default is None else f" = {_literal(one.default)}"
            values = ", ".join(map(_literal, one.choices)) or one.type.__name__
            yield f"`{one.name}`{default}", "", values, one.help


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _field_row(field: Field, kind: str) -> tuple[str, str, str, str, str]:
    return field.name, kind, in_words(field.legal), _default(field), field.help


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _default(field: Field) -> str:
    if field.default is None:
        return ""
    return "see meaning" if callable(field.default) else str(field.default).lower()
