"""Generates text with a small DeepSeek-V4 model of transformers, with and without kvfold.

    python examples/generate.py

The weights are random, so the text is a list of numbers. The two models have the same weights and
must generate the same tokens. On a GPU, kvfold also decodes with one CUDA graph launch per step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

import kvfold.adapters.transformers as adapter

PLOT = Path("build/generate.png")
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
    "mlp_layer_types": ["moe"] * 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 32,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "partial_rotary_factor": 0.5,
    "sliding_window": 64,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}

Generate = Callable[[Any, Tensor, int], Tensor]


def main() -> None:
    """Runs the example."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    words.add_argument("--prompt", type=int, default=300, help="tokens of the prompt")
    words.add_argument("--new", type=int, default=64, help="tokens to generate")
    given = words.parse_args()
    if given.prompt < 1 or given.new < 2:
        words.error(f"--prompt {given.prompt} --new {given.new}; accepted: 1 or more, 2 or more")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(1)  # the tensors are small
    torch.manual_seed(0)
    plain = make_model(device)
    adapter.patch()  # the one line
    kvfold = make_model(device)
    kvfold.load_state_dict(plain.state_dict())
    draft = make_model(device)  # other weights: its drafts are mostly wrong

    prompt = torch.randint(1, CONFIG["vocab_size"], (1, given.prompt), device=device)
    ways: dict[str, tuple[Any, Generate]] = {
        "transformers": (plain, greedy),
        "kvfold": (kvfold, greedy),
        "kvfold, drafts": (kvfold, lambda *call: greedy(*call, assistant_model=draft)),
    }
    seconds, tokens = {}, {}
    for name, (model, generate) in ways.items():
        seconds[name], tokens[name] = timed(generate, model, prompt, given.new)
        same = "" if tokens[name] == tokens["transformers"] else "   OTHER TOKENS"
        print(f"{name:24} {1e3 * seconds[name] / given.new:8.2f} ms per token{same}")
    if on_gpu:  # in bf16, in which the experts of transformers can be captured in a graph
        for name, generate in (("kvfold, bf16", greedy), ("kvfold, bf16, graph", in_a_graph)):
            seconds[name], _ = timed(generate, kvfold.bfloat16(), prompt, given.new)
            print(f"{name:24} {1e3 * seconds[name] / given.new:8.2f} ms per token")
    print("tokens:", *tokens["kvfold"][0])
    if not on_gpu:
        print("On a CPU kvfold runs its reference, which is made to be right, not to be fast.")
    draw({name: 1e3 * s / given.new for name, s in seconds.items()})
    if any(found != tokens["transformers"] for found in tokens.values()):
        raise SystemExit("the models generate different tokens")


def timed(generate: Generate, model: Any, prompt: Tensor, new: int) -> tuple[float, list]:
    """The seconds that a call takes, and the tokens that it returns."""
    generate(model, prompt, 3)  # compiles what is needed
    start = time.perf_counter()
    tokens = generate(model, prompt, new).tolist()
    return time.perf_counter() - start, tokens


def make_model(device: torch.device) -> Any:
    """A model with random weights."""
    with device:
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**CONFIG)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("position_bias", "sinks")):
            torch.nn.init.normal_(parameter)
    return model


def greedy(model: Any, prompt: Tensor, new: int, **others: Any) -> Tensor:
    """The tokens that greedy generation adds."""
    made = model.generate(prompt, max_new_tokens=new, do_sample=False, **others)
    return made[:, prompt.size(1) :]


def in_a_graph(model: Any, prompt: Tensor, new: int) -> Tensor:
    """The same, decoded by a GraphedDecoder."""
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        logits = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1]
    with adapter.GraphedDecoder(model, cache, prompt.size(1) + new) as decoder:
        for _ in range(new):
            found.append(logits.argmax(-1))
            logits = decoder.step(found[-1])
    return torch.stack(found, dim=1)


def draw(milliseconds: dict[str, float]) -> None:
    """Draws the times into a file, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(6, 3), layout="constrained")
    panel = figure.subplots()
    bars = panel.barh(list(milliseconds), list(milliseconds.values()))
    panel.bar_label(bars, fmt="%.1f")
    panel.invert_yaxis()
    panel.set_xlabel("milliseconds per token")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=120)
    print(f"plot: {PLOT}")


if __name__ == "__main__":
    main()
