"""The ops in torch's library: schemas, who defines them, and who serves them."""

import os
import subprocess
import sys

import pytest
import torch
from trtllm_calls import decode_call, prefill_call, scatter_call
from trtllm_memory import assert_same_memory, copied

import kvfold.adapters.trtllm as trtllm
from kvfold.adapters.trtllm.library import SCHEMAS

CALLS = {
    "compressor_paged_kv_compress": lambda: decode_call([3, 6, 2], 2, [2, 1, 2], longer=1),
    "compressor_prefill_reduction": lambda: prefill_call([(0, 9), (3, 5)], longer=1),
    "compressor_postprocess_scatter": lambda: scatter_call(
        [(0, 2, 2), (5, 1, 2)], kind=2, outputs=True
    ),
}
EACH_OP = pytest.mark.parametrize("name", CALLS)
MUTATED = {
    "compressor_paged_kv_compress": ["paged_kv", "paged_score", "output"],
    "compressor_prefill_reduction": ["paged_kv", "paged_score", "output"],
    "compressor_postprocess_scatter": ["kv_out", "kv_cache", "quant_output", "scale_output"],
}


@EACH_OP
def test_the_schema_has_the_engines_arguments_in_its_order(name):
    schema = getattr(torch.ops.trtllm, name).default._schema
    call = CALLS[name]()
    assert [one.name for one in schema.arguments] == list(call)
    assert [one.name for one in schema.arguments if one.is_write] == MUTATED[name]
    for one in schema.arguments:
        kind = "Optional" if call[one.name] is None else type(call[one.name]).__name__
        assert kind in str(one.type) or one.type.isSubtypeOf(torch.OptionalType.ofTensor())
    assert not schema.returns


@EACH_OP
def test_the_ops_are_registered_as_torch_wants_them(name):
    call = CALLS[name]()
    torch.library.opcheck(getattr(torch.ops.trtllm, name).default, tuple(call.values()))


@EACH_OP
def test_a_compiled_function_does_the_same(name):
    op = getattr(torch.ops.trtllm, name)
    call = CALLS[name]()
    eager, compiled = copied(call), copied(call)
    op(*eager.values())
    torch.compile(lambda args: op(*args), backend="aot_eager", fullgraph=True)(
        tuple(compiled.values())
    )
    assert_same_memory(compiled, eager)


@EACH_OP
def test_meta_tensors_are_accepted(name):
    call = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in CALLS[name]().items()
    }
    assert getattr(torch.ops.trtllm, name)(*call.values()) is None


def run(program):
    """Runs a program in a Python of its own, in which nothing has defined the ops."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


ENGINE = """
import torch
from trtllm_calls import decode_call, scatter_call
from trtllm_memory import assert_same_memory, copied
served = []
engine = torch.library.Library("trtllm", "FRAGMENT")
def define(name, schema):
    engine.define(name + schema)
    engine.impl(name, lambda *args: served.append(name), "CPU")
"""
OLD_DECODE = SCHEMAS["compressor_paged_kv_compress"].replace(
    ", Tensor? new_tokens_per_seq=None", ""
)


@pytest.mark.parametrize("schema", [SCHEMAS["compressor_paged_kv_compress"], OLD_DECODE])
def test_an_engines_op_is_replaced_on_demand_and_given_back(schema):
    run(ENGINE + f"""
define("compressor_paged_kv_compress", {schema!r})
import kvfold.adapters.trtllm as trtllm
import importlib; importlib.reload(trtllm)
op = torch.ops.trtllm.compressor_paged_kv_compress
call = decode_call([3, 6], 2)
del call["new_tokens_per_seq"]
expected = copied(call)
trtllm.compressor_paged_kv_compress(**expected)
for _ in range(2):
    before = copied(call)
    op(*before.values())
    assert_same_memory(before, call)
    assert len(served) == 1
    for _ in range(2):
        trtllm.patch()
    done = copied(call)
    op(*done.values())
    assert_same_memory(done, expected)
    assert len(served) == 1
    for _ in range(2):
        trtllm.unpatch()
    served.clear()
torch.ops.trtllm.compressor_postprocess_scatter(*scatter_call([(0, 1, 1)]).values())
assert not served
""")  # fmt: skip


def test_an_op_with_other_arguments_is_not_replaced():
    schema = SCHEMAS["compressor_postprocess_scatter"]
    schema = schema.replace(") -> ()", ", Tensor? kv_cache_scale=None) -> ()")
    run(ENGINE + f"""
define("compressor_paged_kv_compress", {OLD_DECODE!r})
define("compressor_postprocess_scatter", {schema!r})
import kvfold.adapters.trtllm as trtllm
try:
    trtllm.patch()
except ValueError as error:
    assert "kv_cache_scale" in str(error) and "accepted" in str(error)
else:
    raise AssertionError("no error")
call = decode_call([3, 6], 2)
del call["new_tokens_per_seq"]
torch.ops.trtllm.compressor_paged_kv_compress(*call.values())
assert served == ["compressor_paged_kv_compress"]
""")  # fmt: skip


def test_an_engine_that_is_imported_later_is_named(tmp_path):
    (tmp_path / "tensorrt_llm.py").touch()
    run(f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
try:
    import kvfold.adapters.trtllm
except ImportError as error:
    assert "import tensorrt_llm before" in str(error)
else:
    raise AssertionError("no error")
import tensorrt_llm, kvfold.adapters.trtllm
""")


def test_without_an_engine_there_is_nothing_to_replace():
    call = CALLS["compressor_paged_kv_compress"]()
    expected = copied(call)
    trtllm.compressor_paged_kv_compress(**expected)
    trtllm.patch()
    trtllm.unpatch()
    torch.ops.trtllm.compressor_paged_kv_compress(*call.values())
    assert_same_memory(call, expected)
