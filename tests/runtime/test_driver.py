"""What the CUDA driver gets for a launch: the configuration and the parameters, byte by byte."""

import ctypes
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvfold.codegen import Variant
from kvfold.ops.paged_kv_compress import cuda_kernel
from kvfold.ops.paged_kv_compress.spec import SPEC, Problem, Tuning
from kvfold.ops.paged_kv_compress.workload import WORKLOAD
from kvfold.runtime import driver, internals
from kvfold.runtime.arguments import dimensions_of

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


C_TYPES = {"int64": ctypes.c_int64, "int": ctypes.c_int, "uint32": ctypes.c_uint32}


class Params(ctypes.Structure):
    """The parameter struct of the op, as a C compiler lays it out."""

    _fields_ = [
        (name, C_TYPES.get(kind, ctypes.c_void_p)) for kind, name in SPEC.param_struct.members()
    ]


class FakeKernel:
    """Stands for a loaded kernel; keeps what each launch gives the driver."""

    variant, module, sms, context = VARIANT, cuda_kernel, SMS, 0
    attributes, function = (ATTRIBUTES, 1), FUNCTION

    def __init__(self, status=0):
        self.launches, self.status = [], status

    def cu_launch(self, config, function, params, extra):
        """cuLaunchKernelEx."""
        assert (function, extra, len(params)) == (FUNCTION, None, 1)
        self.launches.append(
            (
                LaunchConfig.from_buffer_copy(
                    ctypes.string_at(config.value, ctypes.sizeof(LaunchConfig))
                ),
                Params.from_buffer_copy(ctypes.string_at(params[0], ctypes.sizeof(Params))),
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
    return [getattr(arguments, one.name).data_ptr() for one in SPEC.arguments.declared_tensors()]


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


def test_the_parameters_fit_in_the_buffer():
    assert ctypes.sizeof(Params) == SPEC.param_struct.size <= driver.MAX_PARAM_BYTES
