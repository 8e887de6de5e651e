"""How threads share a window: what window_shape.cuh works out, for the table's checks."""

from dataclasses import dataclass

ITEM_BYTES = {"bf16": 2, "fp32": 4}
QUAD_ROWS = 4
LEAF_QUADS = 4  # at most, in a leaf


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """The sharing of one slice of a window.

    Attributes:
        compress_ratio: tokens per window.
        overlap: whether a window also has the rows of the window before it.
        state_dtype: 'bf16' or 'fp32'.
        reduce_warps: warps that share the rows.
        head_slice: columns of the slice.
    """

    compress_ratio: int
    overlap: bool
    state_dtype: str
    reduce_warps: int
    head_slice: int

    @property
    def vector(self) -> int:
        """Columns of state in 16 bytes: a thread's columns."""
        return vector(self.state_dtype)

    @property
    def lanes(self) -> int:
        """Threads that cover the slice."""
        return self.head_slice // self.vector

    @property
    def threads(self) -> int:
        """Threads per CTA."""
        return 32 * self.reduce_warps * max(1, self.lanes // 32)

    @property
    def quads(self) -> int:
        """Quads of a window, a power of two."""
        rows = self.compress_ratio * (2 if self.overlap else 1)
        return 1 << (-(-rows // QUAD_ROWS) - 1).bit_length()

    @property
    def group_quads(self) -> int:
        """Quads that fall to one thread."""
        warp_quads = max(min(self.quads, LEAF_QUADS), self.quads // self.reduce_warps)
        return max(1, warp_quads // max(1, 32 // self.lanes))

    @property
    def group_leaves(self) -> int:
        """Leaves that a thread reduces one after the other."""
        return max(1, self.group_quads // min(self.quads, LEAF_QUADS))

    @property
    def held_quads(self) -> int:
        """Quads that a thread holds at once."""
        return min(self.group_quads, self.quads, LEAF_QUADS)

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows that the threads of a CTA hold at once."""
        return self.threads * self.held_quads * QUAD_ROWS * 2 * 16

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA. Rows held in registers leave only the warps' partials there."""
        if self.held_quads > 1:
            return self.rows_bytes
        return 3 * 4 * self.reduce_warps * self.head_slice if self.reduce_warps > 1 else 0


def vector(state_dtype: str) -> int:
    """Columns of state in 16 bytes."""
    return 16 // ITEM_BYTES[state_dtype]


def slices(head_dim: int, state_dtype: str) -> list[int]:
    """Widths of a slice: its threads part a warp evenly or fill whole warps."""
    lanes = (1, 2, 4, 8, 16, *range(32, 1025, 32))
    widths = (vector(state_dtype) * count for count in lanes)
    return [width for width in widths if head_dim % width == 0]
