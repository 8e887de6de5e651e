"""Torch ops made from declarations: what holds for every op that kvfold has."""

import subprocess
import sys

import pytest
import torch

from kvfold.codegen import TableError, TensorArgument, op_spec, op_specs, schema
from kvfold.runtime import torch_op as torch_op_module
from kvfold.runtime.torch_op import TorchOp, register_all, torch_op


@pytest.fixture(params=op_specs())
def op(request):
    return torch_op(request.param)


def test_an_op_is_registered_once(op):
    assert torch_op(op.spec.name) is op
    with pytest.raises(RuntimeError, match=op.spec.name):
        TorchOp(op.spec)


def test_an_op_that_is_not_declared_is_an_error():
    with pytest.raises(TableError, match="norm is no op"):
        torch_op("norm")


def test_torch_has_the_declared_schema(op):
    registered = getattr(torch.ops.kvfold, op.spec.name).default
    declared = torch._C.parse_schema(f"kvfold::{schema(op.spec.name, op.spec.arguments)}")
    assert registered._schema == declared
    assert torch.Tag.pt2_compliant_tag in registered.tags
    assert torch.Tag.needs_exact_strides in registered.tags


def test_scalars_that_are_left_out_have_their_default(op):
    tensors = tuple(object() for _ in op.spec.arguments.declared_tensors())
    scalars = op.spec.arguments.declared_scalars()
    required = tuple(7 for one in scalars if one.default is None)
    defaults = tuple(one.default for one in scalars if one.default is not None)
    assert op._split((*tensors, *required), {}) == (tensors, required + defaults)
    names = [one.name for one in op.spec.arguments.declared()]
    by_name = dict(zip(names, (*tensors, *required), strict=False))
    assert op._split((), by_name) == (tensors, required + defaults)
    assert op._split(tensors[:1], dict(list(by_name.items())[1:])) == (tensors, required + defaults)


def test_missing_and_unknown_arguments_are_a_type_error(op):
    names = [one.name for one in op.spec.arguments.declared()]
    required = [
        one for one in op.spec.arguments.declared() if getattr(one, "default", None) is None
    ]
    for left_out in required:
        given = {one.name: None for one in required if one is not left_out}
        with pytest.raises(TypeError, match=f"missing 1 required .*'{left_out.name}'"):
            op(**given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        op(*[None] * len(required), other=1)
    with pytest.raises(TypeError, match="positional arguments but"):
        op(*[None] * (len(names) + 1))


def test_the_shapes_of_a_few_tensors_tell_every_dimension(op):
    tensors = op.spec.arguments.declared_tensors()
    told = {
        dimension.name
        for index in op._keyed
        for dimension in tensors[index].shape
        if dimension.name
    }
    assert told == {
        dimension.name for one in tensors for dimension in one.shape if dimension.name is not None
    }


def test_tensors_are_declared_before_scalars(op):
    kinds = [isinstance(one, TensorArgument) for one in op.spec.arguments.declared()]
    assert kinds == sorted(kinds, reverse=True)


def test_importing_torch_ops_registers_every_op():
    program = (
        "import torch\n"
        "from kvfold.codegen import op_specs\n"
        "assert not any(hasattr(torch.ops.kvfold, op) for op in op_specs())\n"
        "import kvfold.torch_ops\n"
        "assert op_specs() and all(hasattr(torch.ops.kvfold, op) for op in op_specs())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_register_all_may_be_called_again():
    register_all()
    register_all()
    for name in op_specs():
        assert torch_op(name).spec is op_spec(name)


def test_the_device_is_made_current_for_cuda_alone(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    torch_op_module.on_device(torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1)]
    with torch_op_module.on_device(torch.device("cpu")):
        assert len(entered) == 1
