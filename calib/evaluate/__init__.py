"""Exact LVIS and COCO AP, per category, without their APIs."""

from .areas import AREA_NAMES, AREA_RANGES
from .average_precision import RECALL_POINTS
from .bins import DEFAULT_BINS, bin_index
from .evaluate_files import evaluate_files
from .evaluation import Evaluation, Evaluator, Rescored, evaluate
from .folder import read_counts, write_evaluation
from .ground_truth import GroundTruth
from .overlaps import IOU_THRESHOLDS, BoxSet
from .results import Detections

__all__ = [
    "AREA_NAMES",
    "AREA_RANGES",
    "DEFAULT_BINS",
    "IOU_THRESHOLDS",
    "RECALL_POINTS",
    "BoxSet",
    "Detections",
    "Evaluation",
    "Evaluator",
    "GroundTruth",
    "Rescored",
    "bin_index",
    "evaluate",
    "evaluate_files",
    "read_counts",
    "write_evaluation",
]
