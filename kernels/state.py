"""Which rows of a request's state are still needed."""

from __future__ import annotations

from collections.abc import Iterator


def live_rows(
    length: int,
    compress_ratio: int,
    *,
    overlap: bool | None = None,
    max_rollback: int = 0,
    state_period: int = 0,
) -> list[range]:
    """The positions whose rows of the state a request needs to go on.

    Another pool, on this node or another, needs these rows and the compressed rows, and nothing
    else of the request. They are the rows that `prefill_compress` stores with write_state="tail":
    position p is one if p >= ((length - max_rollback) // R - O) * R or, for a multiple m of
    state_period with 0 < m <= length, (m // R - O) * R <= p < m. R is compress_ratio; O is 1 with
    an overlap, else 0.

    Args:
        length: tokens of the request, 0 or more.
        compress_ratio: tokens per window.
        overlap: whether a window also has the rows of the window before it; None: as the table has
            it by default, for compress_ratio 4 alone.
        max_rollback: the most tokens at the end that may still be rejected.
        state_period: requests that share a prefix restart at multiples of it; 0: they do not.

    Returns:
        Ranges of positions below `length`, in order, apart from each other.

    Raises:
        ValueError: an argument is not of its type or below its least value.
    """
    for name, value, least in (
        ("length", length, 0),
        ("compress_ratio", compress_ratio, 1),
        ("max_rollback", max_rollback, 0),
        ("state_period", state_period, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; accepted: an int, {least} or more")
    if overlap is not None and not isinstance(overlap, bool):
        raise ValueError(f"overlap is {overlap!r}; accepted: True, False, None")
    windows_before = compress_ratio == 4 if overlap is None else overlap

    def first_read(position: int) -> int:
        """The first row that the window with the token at a position reads."""
        return max(0, position // compress_ratio - windows_before) * compress_ratio

    restarts = range(state_period, length + 1, state_period) if state_period else range(0)
    parts = [range(first_read(restart), restart) for restart in restarts]
    parts.append(range(first_read(max(0, length - max_rollback)), length))
    return list(_joined(parts))


def _joined(parts: list[range]) -> Iterator[range]:
    """The ranges without those that are empty; neighbours that touch or overlap are one."""
    current = range(0)
    for part in sorted((one for one in parts if one), key=lambda one: one.start):
        if current and part.start <= current.stop:
            current = range(current.start, max(current.stop, part.stop))
        else:
            if current:
                yield current
            current = part
    if current:
        yield current
