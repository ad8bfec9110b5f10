"""One part of work that several processes share without knowing of each other: ``--shard i/N``."""

import os
from dataclasses import dataclass

from calib.errors import SettingError

# Place among the processes of a launcher, number of processes.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 0) of ``count``: a range of pieces. The parts of a whole have all of them, each once."""

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
        SLURM_NTASKS; in an array with the numbers 0 to N - 1, its task times these).

        Raises:
            SettingError: neither, ``env`` where nothing of that kind is set, or an array of other numbers.
        """
        if text == "env":
            return cls._of_launcher()
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise SettingError(f"shard is '{text}': expected i/N with i from 0 to N - 1, or env", hint="--shard 0/4")
        return cls(int(index), int(count))

    @classmethod
    def _of_launcher(cls) -> "Part":
        found = [names for names in LAUNCHERS if all(n in os.environ for n in names)]
        within = cls.parse("/".join(os.environ[n] for n in found[0])) if found else cls()
        if all(n in os.environ for n in ARRAY) and found[:1] != [LAUNCHERS[0]]:
            index, count, first, last = (int(os.environ[n]) for n in ARRAY)
            if first != 0 or last != count - 1:  # a part of an array, sent again: N is not known
                raise SettingError(
                    f"shard is env, but the array has {count} tasks numbered {first} to {last}: expected 0 to N - 1",
                    hint="name the number of parts: --shard $SLURM_ARRAY_TASK_ID/N",
                )
            return cls(index * within.count + within.index, count * within.count)
        if not found:
            raise SettingError(
                "shard is env, but neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS are set",
                hint="start it with torchrun or srun, or name the part: --shard 0/4",
            )
        return within

    def of(self, total: int) -> range:
        """The numbers of its pieces, of ``total``."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)
