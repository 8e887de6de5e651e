"""Torch ops made from declarations: what holds for every op that kvfold has."""

import itertools
import subprocess
import sys

import pytest
import torch

from kvfold.codegen import TableError, TensorArgument, op_spec, op_specs, schema
from kvfold.runtime import internals, repeat
from kvfold.runtime import torch_op as torch_op_module
from kvfold.runtime.torch_op import TorchOp, register_all, torch_op

OPTIONAL = [
    name
    for name, spec in op_specs().items()
    if any(one.optional for one in spec.arguments.declared_tensors())
]


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


def declared_of(op) -> tuple[list, list]:
    """The declared arguments of an op that must be given, and its optional tensors."""
    declared = op.spec.arguments.declared()
    optional = [one for one in declared if isinstance(one, TensorArgument) and one.optional]
    required = [
        one for one in declared if one not in optional and getattr(one, "default", None) is None
    ]
    return required, optional


def split_of(op) -> tuple[dict, tuple, tuple]:
    """Values of the arguments that must be given, and what `_split` makes of them alone."""
    required, optional = declared_of(op)
    scalars = op.spec.arguments.declared_scalars()
    given = {one.name: object() if isinstance(one, TensorArgument) else 7 for one in required}
    tensors = tuple(given[one.name] for one in required if isinstance(one, TensorArgument))
    filled = tuple(7 if one.default is None else one.default for one in scalars)
    return given, (*tensors, *[None] * len(optional)), filled


def test_scalars_that_are_left_out_have_their_default_and_optional_tensors_are_absent(op):
    given, tensors, scalars = split_of(op)
    values = tuple(given.values())
    assert op._split(values, {}) == (tensors, scalars)
    assert op._split((), given) == (tensors, scalars)
    assert op._split(values[:1], dict(list(given.items())[1:])) == (tensors, scalars)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_tensors_are_found_by_name_and_after_the_scalars(name):
    op = torch_op(name)
    given, tensors, scalars = split_of(op)
    optional = [one.name for one in declared_of(op)[1]]
    required = tensors[: -len(optional)]
    for count in range(1, len(optional) + 1):
        for names in itertools.combinations(optional, count):
            values = {one: object() for one in names}
            expected = (*required, *(values.get(one) for one in optional)), scalars
            assert op._split(tuple(given.values()), values) == expected
            assert op._split((), given | values) == expected
            every = tuple(values.get(one) for one in optional)
            assert op._split((*required, *scalars, *every), {}) == expected
    nothing = dict.fromkeys(optional)
    assert op._split(tuple(given.values()), nothing) == (tensors, scalars)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_call_and_its_arguments_hold_the_same(name):
    op = torch_op(name)
    _, tensors, scalars = split_of(op)
    arguments = op._arguments(tensors, scalars)
    assert arguments.tensors() == tensors
    args, kwargs = arguments.args_and_kwargs()
    assert op._split(args, kwargs) == (tensors, scalars)
    assert op._split(arguments.args(), {}) == (tensors, scalars)


def test_missing_and_unknown_arguments_are_a_type_error(op):
    required, _ = declared_of(op)
    for left_out in required:
        given = {one.name: None for one in required if one is not left_out}
        with pytest.raises(TypeError, match=f"missing 1 required .*'{left_out.name}'"):
            op(**given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        op(*[None] * len(required), other=1)
    with pytest.raises(TypeError, match="positional arguments but"):
        op(*[None] * (len(op.spec.arguments.declared()) + 1))


def test_an_argument_that_is_given_twice_is_a_type_error(op):
    given, _, _ = split_of(op)
    first = next(iter(given))
    with pytest.raises(TypeError, match=f"multiple values for argument '{first}'"):
        op._split(tuple(given.values()), {first: 7})


def test_the_shapes_of_a_few_tensors_tell_every_dimension(op):
    tensors = op.spec.arguments.declared_tensors()
    assert not any(tensors[index].optional for index in op._keyed)

    def names(found) -> set[str]:
        return {dimension.name for one in found for dimension in one.shape if dimension.name}

    told = names(tensors[index] for index in op._keyed)
    required = [one for one in tensors if not one.optional]
    assert told & set(op.spec.definitions) == names(required) & set(op.spec.definitions)


def test_tensors_come_before_scalars_and_these_before_optional_tensors(op):
    kinds = [
        (one.optional + 1 if one.optional else 0) if isinstance(one, TensorArgument) else 1
        for one in op.spec.arguments.declared()
    ]
    assert kinds == sorted(kinds)


# ---- repeated calls ------------------------------------------------------------------------------

needs_internals = pytest.mark.skipif(not internals.FOUND, reason="this torch lacks the internals")


@pytest.fixture
def nothing_known():
    repeat.forget()
    yield
    repeat.forget()


class Launches(list):
    """Stands for a kernel's launch; keeps the addresses that it gets."""

    def __call__(self, pointers):
        self.append(list(pointers))


def tensors_of(op, *present: str) -> tuple:
    """Tensors of some shape for an op; of the optional ones, those that are named."""
    declared = op.spec.arguments.declared_tensors()
    return tuple(
        torch.zeros(8, 16) if not one.optional or one.name in present else None for one in declared
    )


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_key_of_a_call_says_which_optional_tensors_it_has(name):
    op = torch_op(name)
    _, _, scalars = split_of(op)
    optional = [one.name for one in declared_of(op)[1]]
    every = [
        names
        for count in range(len(optional) + 1)
        for names in itertools.combinations(optional, count)
    ]
    keys = [op._key("direct", tensors_of(op, *names), scalars) for names in every]
    assert len(set(keys)) == len(every) == 2 ** len(optional)
    again = [op._key("direct", tensors_of(op, *names), scalars) for names in every]
    assert again == keys


@needs_internals
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_repeated_call_gets_a_null_pointer_for_a_tensor_that_is_absent(name, nothing_known):
    op = torch_op(name)
    _, _, scalars = split_of(op)
    optional = [one.name for one in declared_of(op)[1]]
    launches = {}
    for names in {(), tuple(optional), tuple(optional[:1]), tuple(optional[1:])}:
        tensors = tensors_of(op, *names)
        key = op._key("direct", tensors, scalars)
        assert not op._launch_again(key, tensors)  # each combination is a call of its own
        launches[tuple(names)] = Launches()
        repeat.remember(key, op._different(tensors), launches[tuple(names)])
    for names, launch in launches.items():
        tensors = tensors_of(op, *names)
        assert op._launch_again(op._key("direct", tensors, scalars), tensors)
        assert launch == [[0 if x is None else x.data_ptr() for x in tensors]]
        assert (0 in launch[0]) == (len(names) < len(optional))


@needs_internals
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_repeated_call_compares_the_layout_of_optional_tensors(name, nothing_known):
    op = torch_op(name)
    _, _, scalars = split_of(op)
    last = declared_of(op)[1][-1].name
    tensors, launch = tensors_of(op, last), Launches()
    key = op._key("direct", tensors, scalars)
    repeat.remember(key, op._different(tensors), launch)
    for other in (torch.zeros(9, 16), torch.zeros(8, 32)[:, :16], torch.zeros(8, 16).bfloat16()):
        changed = (*tensors[:-1], other)
        assert op._key("direct", changed, scalars) == key
        assert not op._launch_again(key, changed)
    assert op._launch_again(key, tensors)
    assert len(launch) == 1


@needs_internals
def test_a_repeated_call_refuses_addresses_that_are_not_aligned(op, nothing_known):
    _, _, scalars = split_of(op)
    declared = op.spec.arguments.declared_tensors()
    tensors, launch = tensors_of(op, *[one.name for one in declared]), Launches()
    key = op._key("direct", tensors, scalars)
    repeat.remember(key, op._different(tensors), launch)
    for index, one in enumerate(declared):
        moved = torch.zeros(8 * 16 + 1)[1:].view(8, 16)  # 4 bytes on
        changed = (*tensors[:index], moved, *tensors[index + 1 :])
        assert op._launch_again(key, changed) == (one.alignment <= 4), one.name
    assert op._launch_again(key, tensors)


@needs_internals
def test_a_call_with_another_number_is_another_call(op):
    tensors = tensors_of(op)
    _, _, scalars = split_of(op)
    declared = op.spec.arguments.declared_scalars()
    keys = {op._key("direct", tensors, scalars), op._key("dispatcher", tensors, scalars)}
    for index, one in enumerate(declared):
        other = not scalars[index] if one.type is bool else 0.25 if one.type is float else 8
        keys.add(op._key("direct", tensors, (*scalars[:index], other, *scalars[index + 1 :])))
    assert len(keys) == 2 + len(declared)


# ---- registration --------------------------------------------------------------------------------


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
