"""Declarations of ops: where they are found and what is worked out from them."""

from pathlib import Path

import pytest
from strategies import OP

from kvfold.codegen import TableError, op_spec, op_specs


def test_every_folder_with_a_declaration_is_an_op():
    declarations = (Path(__file__).parents[2] / "kernels/ops").glob("*/spec.py")
    assert set(op_specs()) == {file.parent.name for file in declarations}
    assert all(spec.name == name for name, spec in op_specs().items())
    assert op_spec(OP).name == OP
    with pytest.raises(TableError, match=f"paged_kv is no op, did you mean {OP}\\?"):
        op_spec("paged_kv")


def test_a_dimension_is_defined_by_the_first_tensor_or_the_declared_one():
    spec = op_spec(OP)
    assert spec.definitions == {
        "num_tokens": ("kv_score", 0),
        "compress_ratio": ("ape", 0),
        "state_dim": ("paged_kv", 2),  # by declaration; ape has it first
        "num_pages": ("paged_kv", 0),
        "page_size": ("paged_kv", 1),
        "batch": ("kv_lens", 0),  # by declaration; block_table_kv has it first
        "max_pages": ("block_table_kv", 1),
        "num_outputs": ("output", 0),
        "head_dim": ("output", 1),
    }
    assert spec.defined_by.keys() <= spec.definitions.keys()


def test_every_member_of_the_parameter_struct_has_a_name_of_its_own():
    names = [name for _, name in op_spec(OP).param_struct.members()]
    assert len(set(names)) == len(names)
