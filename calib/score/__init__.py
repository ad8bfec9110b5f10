"""Detections from a head's scores: of a cache in memory, in files, and with masks."""

from .scorer import ImageDetections, Scorer, detector_nms, score

__all__ = ["ImageDetections", "Scorer", "detector_nms", "score"]
