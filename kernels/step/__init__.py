"""What surrounds the kernels in a decode step: uploads, one submission, segments in host memory."""

from kvfold.step.batch import StepBatch
from kvfold.step.prefetch import SegmentPrefetcher
from kvfold.step.staging import StagingPool

__all__ = ["SegmentPrefetcher", "StagingPool", "StepBatch"]
