"""What the tests of the commands share."""

import pytest

SMALL = """\
version: 1
paged_kv_compress:
  - {head_dim: 64, compress_ratio: [4, 128], kv_dtype: bf16, state_dtype: fp32, next_n: 4,
     backend: cuda, reduce_warps: 1, head_slice: 64}
  - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 2,
     backend: cuda, arch: sm_80, max_batch: 8, reduce_warps: 1, head_slice: 64}
  - {head_dim: 64, compress_ratio: 128, kv_dtype: bf16, state_dtype: fp32, next_n: 2,
     backend: cuda, arch: sm_80, min_batch: 9, reduce_warps: 4, head_slice: 64}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A table of three rows, in force."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    monkeypatch.setenv("KVFOLD_CONFIG", str(file))
    return file
