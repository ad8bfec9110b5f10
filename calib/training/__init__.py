"""Training heads on a feature cache: the loop, the plan of a head, and ``train``, which runs plans."""

from .plan import settings_of
from .runner import train

__all__ = ["settings_of", "train"]
