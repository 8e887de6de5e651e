"""Requests that are fed their tokens in several calls of the store ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from store_calls import CALLS, DECODE, PREFILL, STATE, make, run_op
from torch import Tensor


class Feed:
    """Requests that get their tokens in several calls, from an empty state full of NaN.

    Attributes:
        whole: the call that feeds all of them at once. It holds the state and the cache.
        length: tokens that each request has been fed.
    """

    def __init__(self, lengths: Sequence[int], **fields) -> None:
        """
        Args:
            lengths: tokens of each request in the end.
            fields: as `make` takes them.
        """
        self.whole = make(PREFILL, [(0, length) for length in lengths], **fields)
        for name in STATE:
            getattr(self.whole, name).fill_(torch.nan)
        self.length = np.zeros(len(lengths), np.int64)
        self._first_token = self.whole.cu_seq_lens.cpu().numpy()[:-1].astype(np.int64)
        self._first_row = self.whole.cu_outputs.cpu().numpy()[:-1].astype(np.int64)

    @property
    def left(self) -> np.ndarray:
        """Tokens that each request has not been fed."""
        return np.diff(self.whole.cu_seq_lens.cpu().numpy()) - self.length

    def feed(self, op: str, new: Sequence[int], rejected: Sequence[int] = (), **scalars) -> Any:
        """Feeds each request so many tokens, of which the last `rejected` are wrong ones.

        Returns:
            the call, which has been run.
        """
        call = self.next_call(op, new, rejected, **scalars)
        run_op(call)
        return call

    def next_call(
        self, op: str, new: Sequence[int], rejected: Sequence[int] = (), **scalars
    ) -> Any:
        """The same, but for its run: the tokens that are not rejected count as fed."""
        whole, ratio = self.whole, self.whole.compress_ratio
        new = np.minimum(new, self.left)
        rejected = np.minimum(np.resize(rejected or [0], len(new)), new)
        end = self.length + new
        tokens = _ranges(self._first_token + self.length, new)
        closed = end // ratio - self.length // ratio
        rows = _ranges(self._first_row + self.length // ratio, closed)
        kv_score = whole.kv_score[tokens.to(whole.kv_score.device)]
        for last, wrong in zip(new.cumsum(), rejected, strict=True):
            kv_score[last - wrong : last] = 7
        fields = {one.name: getattr(whole, one.name) for one in CALLS[PREFILL].declared()}
        fields |= {
            "kv_score": kv_score,
            "kv_lens": self._int32(end),
            "cu_seq_lens": self._int32(np.append(0, new.cumsum())),
            "cu_outputs": self._int32(np.append(0, closed.cumsum())),
            "positions": whole.positions[rows.to(whole.positions.device)],
            "slots": whole.slots[rows.to(whole.slots.device)],
            **scalars,
        }
        if op == DECODE:
            fields = {"next_n": 8} | fields
            fields = {one.name: fields.get(one.name) for one in CALLS[DECODE].declared()}
        self.length = end - rejected
        return CALLS[op](**fields)

    def _int32(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.whole.ape.device)


def _ranges(first: np.ndarray, count: np.ndarray) -> Tensor:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    parts = [np.arange(start, start + n) for start, n in zip(first, count, strict=True)]
    return torch.from_numpy(np.concatenate(parts))
