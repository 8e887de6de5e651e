"""What the CUDA driver gets for a launch: the configuration and the parameters, byte by byte."""

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvfold.codegen import OpSpec, Variant, load_table, op_specs
from kvfold.ops.norm_rope_store import cuda_kernel as norm_kernel
from kvfold.ops.norm_rope_store import spec as norm
from kvfold.ops.paged_kv_compress import cuda_kernel
from kvfold.ops.paged_kv_compress.spec import SPEC, Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import driver, internals
from kvfold.runtime.arguments import check, dimensions_of

PROBLEM = Problem(head_dim=64, compress_ratio=4, kv_dtype="bf16", state_dtype="fp32", next_n=2)
VARIANT = Variant(problem=PROBLEM, backend="cuda", tuning=Tuning(reduce_warps=1, head_slice=32))
STREAM, ATTRIBUTES, FUNCTION = 0x1122334455667788, 0x99AABBCCDDEE0000, 0x123456789
SMS = 132


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, as cuda.h has it."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


C_TYPES = {
    "int64": ctypes.c_int64,
    "int": ctypes.c_int,
    "uint32": ctypes.c_uint32,
    "float": ctypes.c_float,
}


def params_of(spec: OpSpec) -> type[ctypes.Structure]:
    """The parameter struct of an op, as a C compiler lays it out."""
    members = spec.param_struct.members()
    fields = [(name, C_TYPES.get(kind, ctypes.c_void_p)) for kind, name in members]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


class FakeKernel:
    """Stands for a loaded kernel; keeps what each launch gives the driver."""

    variant, module, ctas_at_once, context = VARIANT, cuda_kernel, SMS, 0
    attributes, function = (ATTRIBUTES, 1), FUNCTION

    def __init__(self, status=0):
        self.launches, self.status = [], status
        self.params = params_of(self.variant.spec)

    def cu_launch(self, config, function, params, extra):
        """cuLaunchKernelEx."""
        assert (function, extra, len(params)) == (FUNCTION, None, 1)
        self.launches.append(
            (
                LaunchConfig.from_buffer_copy(
                    ctypes.string_at(config.value, ctypes.sizeof(LaunchConfig))
                ),
                self.params.from_buffer_copy(
                    ctypes.string_at(params[0], ctypes.sizeof(self.params))
                ),
            )
        )
        return self.status


@pytest.fixture(autouse=True)
def buffer(monkeypatch):
    """A launch buffer of this thread, made without a CUDA context."""
    fake = SimpleNamespace(ctxGetCurrent=lambda: 1)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", SimpleNamespace(driver=fake))
    monkeypatch.setattr(driver, "_buffer", driver._LaunchBuffer())
    monkeypatch.setattr(internals, "raw_stream", lambda device: STREAM)


def call(batch=3, **scalars):
    options = WORKLOAD.options(page_size=8, layout="packed")
    case = WORKLOAD.make(PROBLEM, batch, "all-hit", options, torch.device("cpu"))
    return replace(case.arguments, **scalars)


def pointers_of(arguments) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in arguments.tensors()]


def test_a_launch_has_the_grid_of_the_plan_and_the_current_stream():
    kernel, arguments = FakeKernel(), call()
    plan = cuda_kernel.plan(VARIANT, SMS, arguments, dimensions_of(SPEC, arguments))
    driver.PackedLaunch(kernel, arguments)(pointers_of(arguments))
    ((config, _),) = kernel.launches
    assert (config.grid_x, config.grid_y, config.grid_z) == (plan.ctas, 1, 1)
    assert (config.block_x, config.block_y, config.block_z) == (VARIANT.launch.threads, 1, 1)
    assert config.shared_bytes == VARIANT.launch.shared_bytes
    assert (config.stream, config.attributes, config.attribute_count) == (STREAM, ATTRIBUTES, 1)


def test_the_parameters_are_pointers_strides_dimensions_scalars_and_the_plans_values():
    kernel, arguments = FakeKernel(), call()
    dimensions = dimensions_of(SPEC, arguments)
    plan = cuda_kernel.plan(VARIANT, SMS, arguments, dimensions)
    driver.PackedLaunch(kernel, arguments)(pointers_of(arguments))
    ((_, params),) = kernel.launches
    for one in SPEC.arguments.declared_tensors():
        tensor = getattr(arguments, one.name)
        if tensor is None:
            assert not getattr(params, one.name)  # a null pointer
            continue
        assert getattr(params, one.name) == tensor.data_ptr()
        assert [getattr(params, name) for name in one.strides] == list(tensor.stride()[:-1])
    assert params.paged_kv_slot_stride == 2 * 128  # KV and score side by side
    expected = dimensions | {"prefetch": 0} | dict(plan.values)
    for _, name in SPEC.param_struct.numbers:
        assert getattr(params, name) == expected[name]
    assert (params.batch, params.page_size) == (3, 8)


@pytest.mark.parametrize(("prefetch", "number"), [("none", 0), ("metadata", 1), ("state", 2)])
def test_a_word_is_its_place_among_the_choices(prefetch, number):
    kernel, arguments = FakeKernel(), call(prefetch=prefetch)
    driver.PackedLaunch(kernel, arguments)(pointers_of(arguments))
    assert kernel.launches[0][1].prefetch == number


@pytest.mark.parametrize("work", ["all", "store", "reduce"])
def test_the_parameters_say_which_steps_the_grid_does(work):
    kernel, arguments = FakeKernel(), call(work=work)
    driver.PackedLaunch(kernel, arguments)(pointers_of(arguments))
    ((config, params),) = kernel.launches
    assert (params.stores, params.reduces) == (work != "reduce", work != "store")
    reducing = 3 * 2 * params.reduces  # slices of three requests
    assert params.reducing == reducing
    assert (config.grid_x > reducing) == params.stores


def test_a_launch_that_is_packed_once_serves_other_tensors_of_the_same_layout():
    kernel, first, second = FakeKernel(), call(), call()
    launch = driver.PackedLaunch(kernel, first)
    driver.PackedLaunch(kernel, call(batch=5))(pointers_of(call(batch=5)))  # in between
    launch(pointers_of(second))
    (_, other), (config, params) = kernel.launches
    assert other.batch == 5 and params.batch == 3
    assert params.output == second.output.data_ptr()
    assert config.stream == STREAM


def test_a_plan_without_ctas_launches_nothing(monkeypatch):
    empty = SimpleNamespace(plan=lambda *given: replace(cuda_kernel.plan(*given), ctas=0))
    monkeypatch.setattr(FakeKernel, "module", empty)
    kernel, arguments = FakeKernel(), call()
    driver.PackedLaunch(kernel, arguments)(pointers_of(arguments))
    assert kernel.launches == []


def test_a_launch_that_fails_names_the_kernel_and_the_error():
    kernel, arguments = FakeKernel(status=700), call()
    with pytest.raises(RuntimeError, match=f"{VARIANT.symbol} was not launched: CUDA error 700"):
        driver.PackedLaunch(kernel, arguments)(pointers_of(arguments))


@pytest.mark.parametrize("op", op_specs())
def test_the_parameters_fit_in_the_buffer(op):
    spec = op_specs()[op]
    assert ctypes.sizeof(params_of(spec)) == spec.param_struct.size <= driver.MAX_PARAM_BYTES


# ---- optional tensors, any strides, floats -------------------------------------------------------


class NormKernel(FakeKernel):
    """Stands for a kernel of norm_rope_store."""

    variant = Variant(
        problem=norm.Problem(head_dim=512, rows_dtype="bf16"),
        backend="cuda",
        tuning=norm.Tuning(warps=2),
    )
    module = norm_kernel


def norm_arguments(**fields) -> norm.Arguments:
    given = {
        "rows": torch.zeros(5, 512, dtype=torch.bfloat16),
        "weight": torch.zeros(512),
        "rope_table": torch.zeros(9, 32, 2).transpose(1, 2),
        "positions": torch.zeros(5, dtype=torch.int32),
        "slots": torch.zeros(5, dtype=torch.int64),
        "cache": torch.zeros(3, 4 * 584 + 16, dtype=torch.uint8),
        "eps": 1e-6,
        "rows_per_page": 4,
        "format": "mixed_584",
    }
    arguments = norm.Arguments(**given | fields)
    check(norm.SPEC, arguments)
    return arguments


def launched(arguments: norm.Arguments, **tensors):
    """(configuration, parameters) of a launch that is packed for the arguments.

    Args:
        tensors: what the launch gets in the place of some of them.
    """
    kernel = NormKernel()
    given = replace(arguments, **tensors).tensors()
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in given]
    driver.PackedLaunch(kernel, arguments)(pointers)
    return kernel.launches[0]


def test_a_tensor_that_is_absent_has_a_null_pointer_and_strides_of_0():
    config, params = launched(norm_arguments())
    assert (config.grid_x, config.block_x) == (3, 64)
    for name in ("scale", "latent_out", "rows_out", "codes_out", "scales_out"):
        assert getattr(params, name) is None  # as ctypes has a null pointer
    for name in ("latent_out", "rows_out", "codes_out", "scales_out"):
        assert getattr(params, f"{name}_stride") == 0


def test_a_tensor_that_is_there_has_its_pointer_and_strides():
    outputs = {
        "latent_out": torch.zeros(5, 520, dtype=torch.bfloat16)[:, :512],
        "codes_out": torch.zeros(5, 580, dtype=torch.uint8)[:, :576],
    }
    arguments = norm_arguments(**outputs)
    _, params = launched(arguments)
    assert params.latent_out == outputs["latent_out"].data_ptr()
    assert params.codes_out == outputs["codes_out"].data_ptr()
    assert (params.rows_out, params.scales_out) == (None, None)
    strides = [params.latent_out_stride, params.rows_out_stride, params.codes_out_stride]
    assert strides == [520, 0, 580]
    # The members that follow the strides are where they belong.
    assert (params.num_rows, params.rows_per_page) == (5, 4)
    other = torch.zeros(5, 580, dtype=torch.uint8)[:, :576]
    assert launched(arguments, codes_out=other)[1].codes_out == other.data_ptr()


def test_a_tensor_of_any_strides_has_all_of_them_in_the_parameters():
    _, params = launched(norm_arguments())
    assert (params.rope_position_stride, params.rope_part_stride, params.rope_pair_stride) == (
        64, 1, 2,
    )  # fmt: skip
    halves = torch.zeros(9, 2, 32)
    _, params = launched(norm_arguments(rope_table=halves))
    assert (params.rope_position_stride, params.rope_part_stride, params.rope_pair_stride) == (
        64, 32, 1,
    )  # fmt: skip
    assert params.max_pos == 9


@pytest.mark.parametrize("eps", [0.0, 0.1, 1e-6, 1e-45, 3.4e38])
def test_a_float_is_in_the_parameters_as_fp32(eps):
    _, params = launched(norm_arguments(eps=eps, prefetch="state"))
    assert params.eps == ctypes.c_float(eps).value
    assert (params.largest, params.prefetch) == (448.0, 2)


@pytest.mark.parametrize("name", load_table().formats)
def test_the_parameters_say_where_the_bytes_of_a_format_are(name):
    format = load_table().formats[name]
    layout = format.layout(512, 64, 4)
    cache = torch.zeros(3, layout.page_bytes + 4, dtype=torch.uint8)
    _, params = launched(norm_arguments(format=name, cache=cache))
    largest = {"fp8_e4m3": 448.0, "fp4_e2m1": 6.0}
    assert format.code not in largest or params.largest == largest[format.code]
    floor = ctypes.c_float.from_buffer_copy(ctypes.c_uint32(params.floor_bits))
    assert floor.value == ctypes.c_float(format.floor).value
    assert params.row_stride == layout.data_offset(1) - layout.data_offset(0)
    assert params.scale_start == layout.scale_offset(0)
    assert params.scale_stride == layout.scale_offset(1) - layout.scale_offset(0)
    assert (params.cache_stride, params.cache_pages) == (layout.page_bytes + 4, 3)
    assert (params.rows_per_page, params.num_rows) == (4, 5)
