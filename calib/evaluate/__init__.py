"""Exact LVIS box AP, per category, without the LVIS API."""

from .average_precision import RECALL_POINTS
from .bins import DEFAULT_BINS, bin_index
from .evaluation import Evaluation, evaluate
from .ground_truth import GroundTruth
from .match import AREA_NAMES, AREA_RANGES, IOU_THRESHOLDS
from .results import Detections
from .run import evaluate_files, read_counts, write_evaluation

__all__ = [
    "AREA_NAMES",
    "AREA_RANGES",
    "DEFAULT_BINS",
    "IOU_THRESHOLDS",
    "RECALL_POINTS",
    "Detections",
    "Evaluation",
    "GroundTruth",
    "bin_index",
    "evaluate",
    "evaluate_files",
    "read_counts",
    "write_evaluation",
]
