"""A decode step of a DeepSeek-V4 model of transformers, with and without kvfold.

The model has 4 layers of the real sizes, two of each kind, and fewer experts, so that it fits a GPU
with large batches. Weights and the tokens before the step are random.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from kvfold.bench.environment import environment
from kvfold.bench.measure import timing
from kvfold.bench.records import TransformersReport, TransformersRow

BATCHES = (1, 16, 64)
CONTEXTS = (4096, 32768)
EXPERTS = 64  # of 256
LAYERS = ["heavily_compressed_attention", "compressed_sparse_attention"] * 2
STEPS = 32  # per repetition: 8 windows of ratio 4
REPEATS = 5
WARM_UP = 8
GRAPH = "kvfold, one graph"


def require() -> None:
    """Raises ValueError unless transformers is installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("bench transformers needs transformers: pip install 'transformers>=5.17'")


def measure(
    batches: Sequence[int],
    contexts: Sequence[int],
    device: torch.device,
    started: Callable[[str], None],
) -> TransformersReport:
    """Times steps on the GPU `device`, which must be torch's current one.

    Args:
        contexts: tokens per sequence before the first step.
        started: called with every point before it is measured.
    """
    import kvfold.adapters.transformers as adapter

    started("making the models")
    plain = _model(device)
    with adapter.patch():
        patched = _model(device, plain)
    rows = []
    for batch, context in itertools.product(batches, contexts):
        started(f"batch {batch}, context {context}")
        ms: dict[str, float] = {}
        compressors_ms: dict[str, float] = {}
        for name, model in (("transformers", plain), ("kvfold", patched)):
            with adapter.patch() if model is patched else ExitStack():
                step = _steps(model, batch, context, device)
                ms[name], compressors_ms[name] = _time(step, _compressors(model))
                del step
                if model is patched:
                    ms[GRAPH], compressors_ms[GRAPH] = _time_graph(model, batch, context, device)
            torch.cuda.empty_cache()
        rows.append(
            TransformersRow(batch=batch, context=context, step_ms=ms, compressors_ms=compressors_ms)
        )
    return TransformersReport(**environment(device), experts=EXPERTS, rows=rows)


# ---- models and caches ---------------------------------------------------------------------------


def _model(device: torch.device, other: nn.Module | None = None) -> Any:
    """A model in bf16 with random weights, or those of another."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        mlp_layer_types=["moe"] * len(LAYERS),
        n_routed_experts=EXPERTS,
    )
    torch.manual_seed(0)
    with device if other is None else torch.device("meta"):
        model = DeepseekV4ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    if other is not None:  # one set of weights, and of buffers, for both
        own = dict(model.named_modules())
        for name, module in other.named_modules():
            own[name]._parameters.update(module._parameters)
            own[name]._buffers.update(module._buffers)
    return model.requires_grad_(False)


def _compressors(model: Any) -> list[nn.Module]:
    return [layer.self_attn.compressor for layer in model.model.layers]


def _cache(model: Any, batch: int, context: int, device: torch.device) -> Any:
    """A cache after one token, moved on to a number of tokens with random contents."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    _call(model, torch.zeros(batch, 1, dtype=torch.int64, device=device), 0, cache)
    layers: list[Any] = cache.layers
    for layer in layers:
        window = layer.sliding_window - 1
        layer.keys = layer.values = torch.randn_like(layer.keys.expand(-1, -1, window, -1))
        layer.cumulative_length = context
        for state in getattr(layer, "states", {}).values():
            state.reserve(context)
            state.rows.normal_()
            state.pool.normal_()
            state.length, state.oldest = context, context - state.ring
        if not getattr(layer, "states", {}):
            _fill(layer, batch, context)
    return cache


def _fill(layer: Any, batch: int, context: int) -> None:
    """Random contents for a layer of transformers. The context closes a window of both ratios."""
    windows = context // layer.compress_rate
    for name, kv in layer.buffer_kv.items():
        head_dim = kv.size(2) // (2 if hasattr(layer, "overlap_kv") else 1)
        layer.buffer_kv[name] = layer.buffer_gate[name] = kv[:, :0]
        layer.compressed_kv[name] = torch.randn(
            batch, windows, head_dim, dtype=kv.dtype, device=kv.device
        )
        layer.entry_count[name] = windows
        if hasattr(layer, "overlap_kv"):
            part = torch.randn(batch, layer.compress_rate, head_dim, device=kv.device)
            layer.overlap_kv[name], layer.overlap_gate[name] = part.to(kv.dtype), part


def _call(model: Any, tokens: torch.Tensor, position: int, cache: Any) -> torch.Tensor:
    positions = torch.full_like(tokens, position)
    with torch.no_grad():
        return model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[:, -1]


def _steps(model: Any, batch: int, context: int, device: torch.device) -> Callable[[], None]:
    """A function that makes the next step of greedy decoding."""
    cache = _cache(model, batch, context, device)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    positions = itertools.count(context)

    def step() -> None:
        tokens.copy_(_call(model, tokens, next(positions), cache).argmax(-1, keepdim=True))

    return step


def _time_graph(model: Any, batch: int, context: int, device: torch.device) -> tuple[float, float]:
    """The same two times with a GraphedDecoder. The compressors have a graph of their own."""
    from kvfold.adapters.transformers import GraphedDecoder

    cache = _cache(model, batch, context, device)
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    with GraphedDecoder(model, cache, context + WARM_UP + STEPS * REPEATS) as decoder:

        def step() -> None:
            tokens.copy_(decoder.step(tokens).argmax(-1))

        whole, _ = _time(step, [])
        if not decoder.counters.replayed:
            raise RuntimeError("the step was not captured in a graph")
    config = model.config
    hidden = torch.randn(batch, 1, config.hidden_size, device=device, dtype=torch.bfloat16)
    q_residual = torch.randn(batch, 1, config.q_lora_rank, device=device, dtype=torch.bfloat16)
    position = torch.full((batch, 1), context, device=device)
    calls = [
        partial(compressor, hidden, q_residual, position, cache, index)
        for index, compressor in enumerate(_compressors(model))
    ]
    with torch.no_grad():
        return whole, len(calls) * timing.replay(calls).median_us / 1e3


# ---- timing --------------------------------------------------------------------------------------


def _time(step: Callable[[], None], compressors: Sequence[nn.Module]) -> tuple[float, float]:
    """Milliseconds per step, and of its compressors, which another repetition measures."""
    for _ in range(WARM_UP):
        step()
    times = []
    for _ in range(REPEATS - 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / STEPS)
    with _events(compressors) as events:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    inside = sum(begin.elapsed_time(end) for begin, end in events) / STEPS
    return statistics.median(times), inside


@contextmanager
def _events(modules: Sequence[nn.Module]) -> Iterator[list[tuple]]:
    """Records events around each call of the modules."""
    found: list[tuple] = []

    def event() -> torch.cuda.Event:
        one = torch.cuda.Event(enable_timing=True)
        one.record()
        return one

    def before(*_: Any) -> None:
        found.append((event(),))

    def after(*_: Any) -> None:
        found[-1] += (event(),)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield found
