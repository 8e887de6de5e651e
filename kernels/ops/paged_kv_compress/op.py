"""paged_kv_compress: the torch op, its argument checks and its fake."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from kvfold import dispatch, repeat
from kvfold.codegen import Variant
from kvfold.ops.paged_kv_compress import cuda_kernel

OP = "paged_kv_compress"

_LIBRARY = torch.library.Library("kvfold", "FRAGMENT")
_LIBRARY.define(
    f"{OP}(Tensor kv_score, Tensor ape, Tensor(a!) paged_kv, Tensor(b!) paged_score, "
    "Tensor block_table_kv, Tensor block_table_score, Tensor(c!) output, Tensor kv_lens, "
    "Tensor cu_seq_lens, Tensor cu_outputs, int compress_ratio, int next_n, "
    "bool prefetch_state=False) -> ()",
    # The kernels read through the strides they are given; inductor must not change them.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_NAMES = (
    "kv_score", "ape", "paged_kv", "paged_score", "block_table_kv", "block_table_score", "output",
    "kv_lens", "cu_seq_lens", "cu_outputs",
)  # fmt: skip
_NDIMS = (2, 2, 3, 3, 2, 2, 2, 1, 1, 1)
_INTEGERS = frozenset(
    ("block_table_kv", "block_table_score", "kv_lens", "cu_seq_lens", "cu_outputs")
)
_data_ptr = torch.Tensor.data_ptr
_MUTATED = frozenset(("paged_kv", "paged_score", "output"))


def paged_kv_compress(
    kv_score: torch.Tensor,
    ape: torch.Tensor,
    paged_kv: torch.Tensor,
    paged_score: torch.Tensor,
    block_table_kv: torch.Tensor,
    block_table_score: torch.Tensor,
    output: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    cu_outputs: torch.Tensor,
    compress_ratio: int,
    next_n: int,
    prefetch_state: bool = False,
) -> None:
    """Stores the new tokens in the paged state and compresses the windows they close.

    Never synchronises; launches on torch's current stream. state_dim is 2 * head_dim for an
    overlapping window, else head_dim. Last dimensions are contiguous, the rows of floating-point
    tensors 16-byte aligned; all outer strides are honoured.

    Args:
        kv_score: [num_tokens, 2 * state_dim], bf16 or fp32: the new tokens' KV, then their score.
        ape: [compress_ratio, state_dim], fp32: added to the score, row = position % compress_ratio.
        paged_kv: [num_pages, page_size, state_dim], bf16 or fp32, mutated: the KV state.
        paged_score: like paged_kv, mutated: the score state, ape already added.
        block_table_kv: [batch, max_pages], int32: logical page -> physical page of paged_kv.
        block_table_score: [batch, max_pages], int32: the same for paged_score.
        output: [num_outputs, head_dim], bf16 or fp32, mutated: the compressed rows.
        kv_lens: [batch], int32: tokens per request after this step.
        cu_seq_lens: [batch + 1], int32: prefix sums of the new tokens per request.
        cu_outputs: [batch + 1], int32: prefix sums of the output rows reserved per request.
        compress_ratio: tokens per window.
        next_n: the most new tokens any request has in this step.
        prefetch_state: a promise, with which the CUDA kernels (sm_90 and later) read kv_lens,
            cu_seq_lens, cu_outputs, block tables and old rows of the state while the kernel before
            them on the stream still runs, and wait for its end only before they read kv_score and
            ape and before they write. The promise: no kernel that may still run then writes what
            is read early. Those are the kernel just before and, where that one was itself launched
            to overlap the one before it (programmatic dependent launch, as kvfold's own are), so on
            back to the first that was not. Kept where the metadata are made at a step's start and
            each layer has its own state; broken by two calls on one state in a row.

    Raises:
        ValueError: an argument's shape, dtype, device or strides; nothing was launched.
        TableError: no row of the table serves the problem; nothing was launched.
    """
    tensors = (
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, output,
        kv_lens, cu_seq_lens, cu_outputs,
    )  # fmt: skip
    look = None
    if not torch.compiler.is_compiling() and repeat.nobody_watches():
        look = _look(tensors, compress_ratio, next_n, "direct")
        if _launch_again(look, tensors, prefetch_state):
            return
    torch.ops.kvfold.paged_kv_compress.default(*tensors, compress_ratio, next_n, prefetch_state)
    if look is not None:
        _remember(look, tensors, compress_ratio, next_n)


@torch.library.register_fake(f"kvfold::{OP}", lib=_LIBRARY)
def _fake(*args, **kwargs) -> None:
    return None


@torch.library.impl(_LIBRARY, OP, "CPU")
@torch.library.impl(_LIBRARY, OP, "CUDA")
def _run(*args) -> None:
    tensors, (compress_ratio, next_n), prefetch_state = args[:10], args[10:12], args[12:] == (True,)
    look = _look(tensors, compress_ratio, next_n, "dispatcher")
    if not _launch_again(look, tensors, prefetch_state):
        key, batch, device = check_arguments(*args[:12])
        if batch:
            _launch(dispatch.launcher(OP, key, batch, device), device, args)
            _remember(look, tensors, compress_ratio, next_n)


def run_variant(variant: Variant, *args) -> None:
    """The op, but with exactly this variant, in the table or not. Raises ValueError as the op."""
    key, batch, device = check_arguments(*args[:12])
    if key != variant.key:
        raise ValueError(f"{variant.symbol} solves {variant.key}, the arguments are {key}")
    if batch:
        _launch(dispatch.bind(variant, device), device, args)


def _launch(launch: Callable, device: torch.device, args: tuple) -> None:
    """args: the op's, of which the last may be left out."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch(*args[:12], prefetch_state=args[12:] == (True,))


# ---- Calls like one before -----------------------------------------------------------------------


def _look(tensors: tuple, compress_ratio: int, next_n: int, way: str) -> tuple:
    """Tells most calls apart, at little cost: by shapes, and by what is current on which way."""
    kv_score, _, _, _, table_kv, table_score, output, *_ = tensors
    return (
        kv_score.shape,
        table_kv.shape,
        table_kv is table_score,
        output.shape,
        compress_ratio,
        next_n,
        torch._C._cuda_getDevice() if kv_score.is_cuda else -1,
        torch.is_inference_mode_enabled(),
        way,
    )


def _different(tensors: tuple) -> tuple:
    """The tensors, a block table that serves both pools once: a guard takes no tensor twice."""
    return tensors[:5] + tensors[6:] if tensors[4] is tensors[5] else tensors


def _launch_again(look: tuple, tensors: tuple, prefetch_state: bool) -> bool:
    """Launches if a call that looked like this one has been right; whether it did."""
    launch = repeat.find(look, _different(tensors))
    if launch is None:
        return False
    pointers = list(map(_data_ptr, tensors))
    if (pointers[0] | pointers[1] | pointers[2] | pointers[3] | pointers[6]) % 16:
        return False  # a floating-point view of the same layout that begins elsewhere
    launch(prefetch_state, pointers)
    return True


def _remember(look: tuple, tensors: tuple, compress_ratio: int, next_n: int) -> None:
    """Lets calls that look like this one, which has been right, go straight to the launch."""
    on_current_device = (
        tensors[0].is_cuda and tensors[0].device.index == torch.cuda.current_device()
    )
    if not on_current_device or not repeat.can_remember(_different(tensors)):
        return
    key, batch, device = check_arguments(*tensors, compress_ratio, next_n)
    launch = dispatch.launcher(OP, key, batch, device) if batch else None
    if getattr(launch, "func", None) is cuda_kernel.launch:
        again = cuda_kernel.Launch(*launch.args, *tensors, compress_ratio, next_n)
        repeat.remember(look, _different(tensors), again)


# ---- Argument checks -----------------------------------------------------------------------------


def check_arguments(
    kv_score,
    ape,
    paged_kv,
    paged_score,
    block_table_kv,
    block_table_score,
    output,
    kv_lens,
    cu_seq_lens,
    cu_outputs,
    compress_ratio,
    next_n,
) -> tuple[tuple, int, torch.device]:
    """Checks everything that can be checked without reading the device.

    Returns:
        (Variant.key of the problem, batch, device)

    Raises:
        ValueError: naming the argument, what it is, and what is accepted.
    """
    tensors = (
        kv_score, ape, paged_kv, paged_score, block_table_kv, block_table_score, output,
        kv_lens, cu_seq_lens, cu_outputs,
    )  # fmt: skip
    device = kv_score.device
    for name, tensor, ndim in zip(_NAMES, tensors, _NDIMS, strict=True):
        if tensor.device != device:
            _refuse(name, f"on {tensor.device}", f"{device}, where kv_score is")
        if tensor.dim() != ndim:
            _refuse(name, f"of {tensor.dim()} dimensions", f"{ndim} dimensions")
    for name, value in (("compress_ratio", compress_ratio), ("next_n", next_n)):
        if value < 1:
            _refuse(name, value, "a positive integer")

    batch = kv_lens.shape[0]
    head_dim = output.shape[1]
    num_pages, page_size, state_dim = paged_kv.shape
    if page_size < 1:
        _refuse("paged_kv", f"of page_size {page_size}", "page_size >= 1")
    if head_dim < 8 or head_dim % 8:
        _refuse("output", f"of head_dim {head_dim}", "[num_outputs, head_dim], head_dim % 8 == 0")
    if state_dim not in (head_dim, 2 * head_dim):
        _refuse(
            "paged_kv", f"of state_dim {state_dim}",
            f"state_dim {head_dim} (= head_dim), or {2 * head_dim} for an overlapping window",
        )  # fmt: skip
    max_pages = block_table_kv.shape[1]
    expected = (
        ("kv_score", kv_score, (kv_score.shape[0], 2 * state_dim), "[num_tokens, 2*state_dim]"),
        ("ape", ape, (compress_ratio, state_dim), "[compress_ratio, state_dim]"),
        ("paged_score", paged_score, (num_pages, page_size, state_dim), "paged_kv's shape"),
        ("block_table_kv", block_table_kv, (batch, max_pages), "[batch, max_pages]"),
        ("block_table_score", block_table_score, (batch, max_pages), "block_table_kv's shape"),
        ("cu_seq_lens", cu_seq_lens, (batch + 1,), "[batch + 1]"),
        ("cu_outputs", cu_outputs, (batch + 1,), "[batch + 1]"),
    )
    for name, tensor, shape, words in expected:
        if tensor.shape != shape:
            _refuse(name, f"of shape {list(tensor.shape)}", f"{words} = {list(shape)}")

    for name, tensor in zip(_NAMES, tensors, strict=True):
        dtype = tensor.dtype
        if name in _INTEGERS:
            if dtype != torch.int32:
                _refuse(name, f"of {dtype}", "torch.int32")
        elif name == "ape":
            if dtype != torch.float32:
                _refuse(name, f"of {dtype}", "torch.float32")
        elif dtype not in _DTYPE_NAMES:
            _refuse(name, f"of {dtype}", "torch.bfloat16 or torch.float32")
        _check_strides(name, tensor)
    if paged_score.dtype != paged_kv.dtype:
        _refuse("paged_score", f"of {paged_score.dtype}", f"{paged_kv.dtype}, paged_kv's dtype")

    key = (
        head_dim,
        compress_ratio,
        state_dim != head_dim,
        _DTYPE_NAMES[kv_score.dtype],
        _DTYPE_NAMES[paged_kv.dtype],
        next_n,
    )
    return key, batch, device


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_contiguous():
        if name not in _INTEGERS and tensor.data_ptr() % 16:
            _refuse(
                name, "not 16-byte aligned", "a tensor whose rows start at multiples of 16 bytes"
            )
        return
    shape, strides, size = tensor.shape, tensor.stride(), tensor.element_size()
    if shape[-1] > 1 and strides[-1] != 1:
        _refuse(name, f"of strides {strides}", "a contiguous last dimension")
    outer = [stride for length, stride in zip(shape, strides, strict=True) if length > 1][:-1]
    if name in _INTEGERS:
        return
    if tensor.data_ptr() % 16 or any(stride * size % 16 for stride in outer):
        _refuse(name, f"of strides {strides}, first address % 16 = {tensor.data_ptr() % 16}",
                "rows that start at multiples of 16 bytes")  # fmt: skip
    if name in _MUTATED and any(stride < shape[-1] for stride in outer):
        _refuse(name, f"of strides {strides}", "rows that do not overlap: it is written")


def _refuse(name: str, got: object, accepted: str):
    raise ValueError(f"kvfold.{OP}: {name} is {got}; accepted: {accepted}")
