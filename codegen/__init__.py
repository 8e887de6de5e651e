"""kvfold.codegen: the table, and the sources that are generated from it. Loads no torch."""

from .arguments import (
    Arguments,
    ParamStruct,
    ScalarArgument,
    TensorArgument,
    scalar,
    schema,
    tensor,
)
from .errors import TableError
from .fields import FieldSet, choice, dtype, flag, integer, number
from .formats import CacheFormat, PageLayout
from .render import Rendered, instantiate, render
from .spec import Launch, OpSpec, Problem, Tuning, op_spec, op_specs
from .table import Table, load_table
from .variant import Bucket, Group, Variant

__all__ = [
    "Arguments",
    "Bucket",
    "CacheFormat",
    "FieldSet",
    "Group",
    "Launch",
    "OpSpec",
    "PageLayout",
    "ParamStruct",
    "Problem",
    "Rendered",
    "ScalarArgument",
    "Table",
    "TableError",
    "TensorArgument",
    "Tuning",
    "Variant",
    "choice",
    "dtype",
    "flag",
    "instantiate",
    "integer",
    "load_table",
    "number",
    "op_spec",
    "op_specs",
    "render",
    "scalar",
    "schema",
    "tensor",
]
