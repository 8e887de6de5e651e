"""paged_kv_compress_store in Triton: the kernels of its two steps, one after the other."""

from kvfold.codegen import Variant
from kvfold.ops.paged_kv_compress_store.spec import Arguments
from kvfold.ops.two_steps import run_two_steps


def launch(variant: Variant, arguments: Arguments) -> None:
    """Launches both kernels on arguments that the op has checked."""
    run_two_steps("paged_kv_compress", variant, arguments)
