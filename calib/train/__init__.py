"""Fitting heads on a feature cache: one, several in one pass, one in several processes."""

from .head import settings_of, train

__all__ = ["settings_of", "train"]
