"""kvfold in vLLM: the compressor of DeepSeek-V4.

`patch()` installs kvfold as vLLM's `DeepseekCompressor.forward`. Without it, make a
`CompressorLayer` per layer, and a `StepMetadata` per step and group of layers, of vLLM's tensors.
"""

from kvfold.adapters.vllm.install import patch, unpatch
from kvfold.adapters.vllm.layer import CompressorLayer
from kvfold.adapters.vllm.step_metadata import StepMetadata

__all__ = ["CompressorLayer", "StepMetadata", "patch", "unpatch"]
