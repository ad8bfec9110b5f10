"""A look at a user's detector and data before any long work: what is wrong, where, and what mends it."""

from .examine import Case, Examination, examine
from .findings import Finding, Report

__all__ = ["Case", "Examination", "Finding", "Report", "examine"]
