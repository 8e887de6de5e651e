"""The host side of a decode step: metadata uploads, CUDA graphs, and tensors in host memory."""

from kvfold.step.batch import StepBatch
from kvfold.step.prefetch import SegmentPrefetcher
from kvfold.step.staging import StagingPool

__all__ = ["SegmentPrefetcher", "StagingPool", "StepBatch"]
