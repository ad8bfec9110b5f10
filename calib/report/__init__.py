"""One HTML page of what result folders, heads and images say: ``calib report``."""

from .page import Report, write_report

__all__ = ["Report", "write_report"]
