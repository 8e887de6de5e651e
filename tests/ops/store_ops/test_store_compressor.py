"""A compressor of a model, made of torch layers and both ops, against plain torch."""

import numpy as np
import pytest
import row_oracle
import torch
from torch import Tensor

import kvfold
from kvfold.codegen import load_table
from kvfold.formats import dequantise, load_rows

FORMATS = load_table().formats
RATIO, HIDDEN, ROPE_DIM, EPS, NEXT_N = 4, 48, 64, 1e-6, 4
ROWS_PER_PAGE, PAGE_SIZE, POISON = 8, 16, 0xA5


class Compressor(torch.nn.Module):
    """The compressor of an attention layer with overlapping windows, and the memory of requests.

    Attributes:
        length: tokens of each request, rejected ones apart.
    """

    def __init__(self, batch: int, max_tokens: int, head_dim: int, format: str, rotate: bool):
        super().__init__()
        state_dim = 2 * head_dim
        self.kv = torch.nn.Linear(HIDDEN, state_dim, bias=False)
        self.score = torch.nn.Linear(HIDDEN, state_dim, bias=False)
        self.ape = torch.nn.Parameter(torch.randn(RATIO, state_dim))
        self.weight = torch.nn.Parameter(1 + torch.randn(head_dim) / 4)
        self.format, self.rotate = format, rotate
        angles = torch.arange(max_tokens)[:, None] * 100.0 ** -torch.linspace(0, 1, ROPE_DIM // 2)
        self.rope_table = torch.stack([angles.cos(), angles.sin()], dim=1)

        def pages(tokens: int) -> Tensor:
            per_request = -(-tokens // PAGE_SIZE)
            order = torch.randperm(batch * per_request, dtype=torch.int32)
            return order.view(batch, per_request)

        self.block_tables = pages(max_tokens), pages(max_tokens)
        size = (self.block_tables[0].numel(), PAGE_SIZE, state_dim)
        self.state = torch.full(size, torch.nan), torch.full(size, torch.nan)
        windows = -(-max_tokens // RATIO)
        cache_pages = -(-windows // ROWS_PER_PAGE)
        self.cache_table = torch.randperm(batch * cache_pages).view(batch, cache_pages)
        layout = FORMATS[format].layout(head_dim, ROPE_DIM, ROWS_PER_PAGE)
        cache_size = (batch * cache_pages, layout.page_bytes)
        self.cache = torch.full(cache_size, POISON, dtype=torch.uint8)
        self.length = np.zeros(batch, np.int64)

    def slot(self, request: int, window: int) -> int:
        """Where the row of a window lies in the cache."""
        page = int(self.cache_table[request, window // ROWS_PER_PAGE])
        return page * ROWS_PER_PAGE + window % ROWS_PER_PAGE

    @torch.no_grad()
    def forward(self, hidden: list[Tensor]) -> None:
        """Takes the hidden states of each request's new tokens."""
        new = np.array([len(one) for one in hidden])
        end, tokens = self.length + new, torch.cat(hidden)
        windows = [
            (b, window)
            for b in range(len(new))
            for window in range(self.length[b] // RATIO, end[b] // RATIO)
        ]
        closed = end // RATIO - self.length // RATIO
        first = (
            torch.cat([self.kv(tokens), self.score(tokens)], dim=1),
            self.ape,
            *self.state,
            *self.block_tables,
            *(
                torch.from_numpy(x.astype(np.int32))
                for x in (end, np.append(0, new.cumsum()), np.append(0, closed.cumsum()))
            ),
            self.weight,
            self.rope_table,
            torch.tensor([window * RATIO for _, window in windows], dtype=torch.int32),
            torch.tensor([self.slot(*one) for one in windows], dtype=torch.int64),
            self.cache,
            RATIO,
        )
        last = EPS, ROWS_PER_PAGE, self.format, torch.float32
        if self.length.any():
            kvfold.paged_kv_compress_store(*first, NEXT_N, *last, rotate=self.rotate)
        else:
            kvfold.prefill_compress_store(
                *first, *last, rotate=self.rotate, write_state="tail", max_rollback=NEXT_N - 1
            )
        self.length = end

    def plain_rows(self, hidden: Tensor) -> Tensor:
        """The rows of a request's windows, in plain torch and float64."""
        tokens = len(hidden) // RATIO * RATIO
        hidden = hidden[:tokens].double()
        kv = (hidden @ self.kv.weight.double().T).unflatten(0, (-1, RATIO))
        score = (hidden @ self.score.weight.double().T).unflatten(0, (-1, RATIO)) + self.ape
        rows = []
        for w in range(tokens // RATIO):
            before, own = slice(0, self.weight.numel()), slice(self.weight.numel(), None)
            kvs, scores = [kv[w, :, own]], [score[w, :, own]]
            if w:
                kvs.insert(0, kv[w - 1, :, before])
                scores.insert(0, score[w - 1, :, before])
            weight = torch.cat(scores).softmax(dim=0)
            rows.append((weight * torch.cat(kvs)).sum(0))
        x = torch.stack(rows)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * self.weight
        cos, sin = self.rope_table[: len(x) * RATIO : RATIO].double().unbind(1)
        pairs = torch.view_as_complex(x[:, -ROPE_DIM:].unflatten(1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(1)
        x = torch.cat([x[:, :-ROPE_DIM], turned], dim=1)
        if self.rotate:
            matrix = torch.from_numpy(row_oracle.sylvester(x.size(1)))
            x = x @ matrix / x.size(1) ** 0.5
        return x.detach()


# Half a unit of a code in the last place, relative to the value: bf16 has 8 bits, fp8 has 4.
RELATIVE = {"bf16": 2.0**-8, "mixed_584": 2.0**-4, "fp8_block128": 2.0**-4}
# Relative to a row's largest value: what fp32 loses on the way, and half a unit of fp8's denormals,
# which is 2^-10 where 224 or more stands for the largest value of a block.
OF_LARGEST = 1e-5


@pytest.mark.parametrize(
    ("format", "head_dim", "rotate"),
    [("bf16", 128, False), ("fp8_block128", 128, True), ("mixed_584", 512, False)],
)
def test_a_compressor_of_linear_layers(format, head_dim, rotate):
    """A prompt of 300 tokens beside one of 37, then 40 steps of which some reject drafts."""
    torch.manual_seed(0)
    prompts, steps = np.array([300, 37]), 40
    hidden = torch.randn(2, 300 + 4 * steps, HIDDEN)
    model = Compressor(2, hidden.size(1), head_dim, format, rotate)
    model([hidden[b, :length] for b, length in enumerate(prompts)])
    rng, rejections = np.random.default_rng(0), 0
    for step in range(steps):
        new = rng.integers(1, NEXT_N + 1, 2)
        # The last steps reject none, so that no wrong row is left behind the last right one.
        rejected = np.minimum(rng.integers(0, NEXT_N, 2), new - 1) * (step < steps - 3)
        drafts = []
        for b in range(2):
            draft = hidden[b, model.length[b] : model.length[b] + new[b]].clone()
            draft[new[b] - rejected[b] :] = torch.randn(rejected[b], HIDDEN)
            drafts.append(draft)
        model(drafts)
        model.length -= rejected
        rejections += rejected.any()
    assert rejections > 10

    layout = FORMATS[format].layout(head_dim, ROPE_DIM, ROWS_PER_PAGE)
    untouched = torch.ones_like(model.cache, dtype=torch.bool)
    for b, length in enumerate(model.length):
        wanted = model.plain_rows(hidden[b, :length])
        slots = torch.tensor([model.slot(b, window) for window in range(len(wanted))])
        codes, scales = load_rows(model.cache, slots, layout)
        got = dequantise(codes, scales, format, head_dim=head_dim, rope_dim=ROPE_DIM)
        largest = wanted.abs().amax(1, keepdim=True)
        allowed = RELATIVE[format] * wanted.abs() + OF_LARGEST * largest
        worst = ((got - wanted).abs() / allowed).max()
        assert worst <= 1, f"request {b}: {worst} times the tolerance"
        for slot in slots.tolist():
            page, row = divmod(slot, ROWS_PER_PAGE)
            for place in row_oracle.places(FORMATS[format], head_dim, ROPE_DIM, ROWS_PER_PAGE, row):
                untouched[page, place] = False
    assert (model.cache[untouched] == POISON).all()
