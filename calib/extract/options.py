"""What is asked of an extraction."""

from dataclasses import dataclass

from calib.cache.schema import DTYPES, LOGITS_KEPT, MODES
from calib.settings import at_least, one_of


@dataclass(frozen=True)
class Extraction:
    """``mode`` train: label and sample proposals as the detector does when it trains; test: keep every proposal.

    ``logits``: full (every row), probe (a few rows per shard, to check the classifier by), none. ``roi_maps`` keeps the
    pooled map of every proposal: dozens of times the size of its feature. A shard has ``images_per_shard`` images, or
    as many as stay below ``max_shard_bytes`` (0: no limit) whatever the detector finds in them, but at least one. On
    the first ``check_images`` images with detections the rows of a cache must give what the detector itself detects
    (see ``proof``); 0 goes on without, and the manifest says so.
    """

    mode: str = "test"
    dtype: str = "float16"
    logits: str = "full"
    batch_size: int = 8
    images_per_shard: int = 256
    seed: int = 0
    roi_maps: bool = False
    max_shard_bytes: int = 0
    check_images: int = 4

    def __post_init__(self) -> None:
        one_of(self, "mode", MODES)
        one_of(self, "dtype", DTYPES)
        one_of(self, "logits", LOGITS_KEPT)
        at_least(self, 1, "batch_size", "images_per_shard")
        at_least(self, 0, "seed", "max_shard_bytes", "check_images")
