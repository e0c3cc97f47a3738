"""Metrics: an image keeps sums or short lists, never its pixels; every metric follows from them.

So each can be made again from ``per_image.parquet``, in Python and in SQL alike, and an interval
can resample images without predicting again.
"""

from heads.metrics.base import Metric, Stats, named_metrics

__all__ = ["Metric", "Stats", "named_metrics"]
