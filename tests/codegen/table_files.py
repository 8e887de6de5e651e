"""Loads tables from text, and checks what every TableError must have."""

from pathlib import Path

import pytest
from strategies import OP, text

from kvfold.codegen import Table, TableError, load_table, op_spec

PROBLEM = {"head_dim": 512, "compress_ratio": 128, "kv_dtype": "bf16", "state_dtype": "fp32"}
ROW = PROBLEM | {"next_n": 4, "backend": "cuda", "reduce_warps": 8, "head_slice": 64}

Content = str | bytes | list


def load(file: Path, content: Content) -> Table:
    """load_table of a file with this content: text, bytes or rows."""
    content = text(content) if isinstance(content, list) else content
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_table(file)


def refused(file: Path, content: Content) -> TableError:
    """The error that this content raises. Its message holds all that the error knows."""
    with pytest.raises(TableError) as caught:
        load(file, content)
    error = caught.value
    assert error.file == file
    for known in (error.file, error.row, error.field, error.legal):
        assert known is None or str(known) in str(error)
    return error


def problem(**changes):
    """The problem of ROW, with other values."""
    fields = {name: value for name, value in ROW.items() if name in PROBLEM or name == "next_n"}
    return op_spec(OP).problem.of(fields | changes)
