"""How prefill_compress is benchmarked, tuned and tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.codegen import choice
from kvfold.ops import state_oracle
from kvfold.ops.prefill_compress import reference
from kvfold.ops.prefill_compress.spec import SPEC, Arguments, Problem
from kvfold.ops.prefill_workload import (
    SCENARIOS,
    StateOptions,
    candidates,
    is_stored,
    make_prompts,
)
from kvfold.ops.state_workload import METADATA, PREFETCH, TOLERANCES, by_reference
from kvfold.workload import Case, Measurement, Search, Workload

ORACLE_TOKENS = 600  # the most that plain Python loops check in reasonable time


@dataclass(frozen=True, kw_only=True)
class Options(StateOptions):
    """A case beside its problem."""

    output_dtype: str = choice("bf16", "fp32", default="bf16", help="of the output")


def make(
    problem: Problem,
    tokens: int,
    scenario: str,
    options: Options,
    device: torch.device | str,
    seed: int = 0,
) -> Case:
    """Makes one call."""
    prompts = make_prompts(problem, tokens, scenario, options, device, seed)
    output = prompts.maker.output(prompts.closed, problem, options)
    return Case(
        arguments=Arguments(**prompts.arguments, output=output),
        moved_bytes=prompts.moved_bytes + output.nbytes,
        rows=prompts.closed,
    )


def expected(arguments: Arguments) -> Mapping[str, Tensor]:
    """What a call must leave: by the oracle or, for a large call, by the reference."""
    a = arguments
    if a.kv_score.size(0) <= ORACLE_TOKENS:
        overlap = a.paged_kv.size(2) != a.output.size(1)
        problem = Problem(
            head_dim=a.output.size(1), compress_ratio=a.compress_ratio, overlap=overlap,
            kv_dtype="bf16", state_dtype="bf16",
        )  # fmt: skip
        options = Options(
            write_state=a.write_state, max_rollback=a.max_rollback, state_period=a.state_period
        )
        return state_oracle.expected(
            a, None, lambda start, length, p: is_stored(start, length, p, problem, options)
        )
    return by_reference(reference, a)


# ---- the workload --------------------------------------------------------------------------------

_RATIO_128 = {"compress_ratio": 128, "kv_dtype": ["bf16", "fp32"]}
_RATIO_4 = {"compress_ratio": 4, "kv_dtype": ["bf16", "fp32"]}
_BOTH = {"compress_ratio": [128, 4]}
_WRITE_STATE = {"write_state": ["tail", "all"]}
_WHOLE = ("whole",)
_DECODE_TOKENS = 640  # of 256 requests of 1 to 4 tokens
_MIXED_TOKENS = 65536 + 255  # a prompt, and the tokens of 255 requests beside it

WORKLOAD = Workload(
    spec=SPEC,
    options=Options,
    scenarios=SCENARIOS,
    defaults={
        "head_dim": 512,
        "compress_ratio": 128,
        "kv_dtype": "bf16",
        "state_dtype": "fp32",
    },
    sizes=(1024, 8192, 65536),
    check_size=256,
    make=make,
    expected=expected,
    tolerances=TOLERANCES,
    metadata=METADATA,
    prefetch=PREFETCH,
    search=Search(
        candidates=candidates,
        shared_field=None,
        mixture={"whole": 0.7, "chunk": 0.2, "mixed": 0.1},
        # An engine that cares for the time prefetches.
        prefetch={"none": 0.2, "metadata": 0.2, "state": 0.6},
        sizes=(1024, 8192, 65536),
    ),
    suite=(
        # Whole prompts, and what is stored of them.
        Measurement(problem=_RATIO_128, options=_WRITE_STATE, scenarios=_WHOLE),
        Measurement(problem=_RATIO_4, options=_WRITE_STATE, scenarios=_WHOLE),
        Measurement(problem=_RATIO_4 | {"head_dim": 128}, options=_WRITE_STATE, scenarios=_WHOLE),
        Measurement(
            problem=_BOTH, options=_WRITE_STATE | {"requests": 8}, sizes=(65536,), scenarios=_WHOLE
        ),
        Measurement(
            options={"write_state": "all", "requests": 8}, sizes=(8 * 65536,), scenarios=_WHOLE
        ),
        Measurement(problem=_BOTH | {"state_dtype": "bf16"}, scenarios=_WHOLE),
        Measurement(problem={"compress_ratio": 2}, scenarios=_WHOLE),
        # What a decode with drafts and a prefix cache need of the state.
        Measurement(
            problem=_BOTH, options={"max_rollback": 8, "state_period": 256}, scenarios=_WHOLE
        ),
        # Chunks, and requests of one token beside a prompt.
        Measurement(problem=_BOTH, sizes=(8192,), scenarios=("chunk",)),
        Measurement(problem=_BOTH, sizes=(_MIXED_TOKENS,), scenarios=("mixed",)),
        # Beside paged_kv_compress, whose suite has the same requests in scenario ragged.
        Measurement(
            problem=_BOTH,
            options={"write_state": "all"},
            sizes=(_DECODE_TOKENS,),
            scenarios=("decode",),
            baseline=True,
        ),
        Measurement(problem=_BOTH, sizes=(8192,), scenarios=_WHOLE, override={"backend": "triton"}),
    ),
)
