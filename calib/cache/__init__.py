"""The feature cache: one row per proposal, written once by the frozen detector, read by everything after it.

Format version 1 is described in ``schema.py``.
"""

from calib.cache.categories import Categories
from calib.cache.classifier import Classifier
from calib.cache.read import Cache
from calib.cache.schema import Manifest

__all__ = ["Cache", "Categories", "Classifier", "Manifest"]
