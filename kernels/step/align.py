"""Where the next thing begins in a block of memory that holds several."""

ALIGNMENT = 256  # bytes; that of a device allocation, so that views are as good as allocations


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The least multiple of alignment that is no less."""
    return -(-nbytes // alignment) * alignment
