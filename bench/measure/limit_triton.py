"""limit.cu in Triton, for a machine without NVRTC."""
# Triton takes launch options beside a kernel's arguments.
# pyright: reportCallIssue=false

import torch


class TritonKernels:
    """The same methods as limit.CudaKernels."""

    def __init__(self, device: torch.device, ctas: int, threads: int):
        """Args: ctas, threads: of the grid that reads."""
        self._ctas, self._warps = ctas, threads // 32
        self._block = 4 * 4 * threads  # int32 per program and round: four 16-byte loads per thread
        self._sink = torch.zeros(1, dtype=torch.int32, device=device)
        self._read_words, self._empty = _kernels()

    def read(self, words: torch.Tensor) -> None:
        """Reads all of a contiguous int32 tensor of fewer than 2**31 elements."""
        rounds = -(-words.numel() // (self._ctas * self._block))
        self._read_words[(self._ctas,)](
            words, words.numel(), self._sink, rounds, self._block, num_warps=self._warps
        )

    def empty(self) -> None:
        """Does nothing."""
        self._empty[(1,)](self._sink)


def _kernels():
    import triton
    import triton.language as tl

    @triton.jit
    def read_words(words, count, sink, rounds: tl.constexpr, block: tl.constexpr):
        seen = tl.zeros((block,), tl.int32)
        for turn in range(rounds):
            start = (turn * tl.num_programs(0) + tl.program_id(0)) * block
            columns = start + tl.arange(0, block)
            seen ^= tl.load(words + columns, mask=columns < count, other=0)
        total = tl.xor_sum(seen, 0)
        if total == 0x1E3779B9:
            tl.store(sink, total)

    @triton.jit
    def empty(sink):
        pass

    return read_words, empty
