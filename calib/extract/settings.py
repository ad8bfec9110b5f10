"""What is asked of an extraction."""

import os
from dataclasses import dataclass

from calib.cache.schema import DTYPES, LOGITS_KEPT, MODES
from calib.errors import SettingError
from calib.settings import at_least, one_of


@dataclass(frozen=True)
class Extraction:
    """``mode`` train: label and sample proposals as the detector does when it trains; test: keep every proposal.

    ``logits``: full (every row), probe (a few rows per shard, to check the classifier by), none. ``roi_maps`` keeps the
    pooled map of every proposal: dozens of times the size of its feature. A shard has ``images_per_shard`` images, or
    as many as stay below ``max_shard_bytes`` (0: no limit) whatever the detector finds in them, but at least one.
    """

    mode: str = "test"
    dtype: str = "float16"
    logits: str = "full"
    batch_size: int = 8
    images_per_shard: int = 256
    seed: int = 0
    roi_maps: bool = False
    max_shard_bytes: int = 0

    def __post_init__(self) -> None:
        one_of(self, "mode", MODES)
        one_of(self, "dtype", DTYPES)
        one_of(self, "logits", LOGITS_KEPT)
        at_least(self, 1, "batch_size", "images_per_shard")
        at_least(self, 0, "seed", "max_shard_bytes")


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 0) of ``count``: a range of shards. The parts of a set have all of its shards, each once."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise SettingError(
                f"shard is {self.index}/{self.count}: expected i/N with i from 0 to N - 1", hint="--shard 0/4 ... 3/4"
            )

    @classmethod
    def parse(cls, text: str) -> "Part":
        """``i/N``, or ``env``: the place of this process under torchrun (RANK, WORLD_SIZE) or Slurm (SLURM_PROCID,
        SLURM_NTASKS).

        Raises:
            SettingError: neither, or ``env`` where nothing of that kind is set.
        """
        if text == "env":
            for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
                if all(n in os.environ for n in names):
                    return cls.parse("/".join(os.environ[n] for n in names))
            raise SettingError(
                "shard is env, but neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set",
                hint="start it with torchrun or srun, or name the part: --shard 0/4",
            )
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise SettingError(f"shard is '{text}': expected i/N with i from 0 to N - 1, or env", hint="--shard 0/4")
        return cls(int(index), int(count))

    def of(self, total: int) -> range:
        """The numbers of its shards, of ``total``."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)
