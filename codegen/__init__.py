"""kvfold.codegen: the table and the sources generated from it. Knows no torch and no GPU."""

from .render import Rendered, instantiate, render
from .table import Table, load_table
from .variant import Bucket, TableError, Variant

__all__ = [
    "Bucket",
    "Rendered",
    "Table",
    "TableError",
    "Variant",
    "instantiate",
    "load_table",
    "render",
]
