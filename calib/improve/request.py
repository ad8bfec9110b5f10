"""What an improvement is asked for: the detector, the data, how long to search."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from calib.errors import SettingError
from calib.evaluate.bootstrap import check_replicates
from calib.files import hash_file, require
from calib.improve.entries import Entry
from calib.layout import RunFolder
from calib.parallel.devices import choose_device
from calib.tune.objective import Objective
from calib.tune.plan import Plan, budget_of

DETECTOR, CONTROL, CHOSEN, CALIBRATED = "detector", "control", "chosen", "chosen-calibrated"
NAMES = (DETECTOR, CONTROL, CHOSEN, CALIBRATED)
CONVERGED = "natural-converged"  # a row of this name is the control of its table


@dataclass(frozen=True)
class Data:
    """Annotation files and the folder of their pictures. Heads are judged on ``val``; they are chosen on ``tune``, or
    without it on folds of ``val`` (cross-fitting)."""

    train: Path
    images: Path
    val: Path
    tune: Path | None = None

    @property
    def is_crossed(self) -> bool:
        """Whether ``val`` serves both to choose and to judge, by cross-fitting."""
        return self.tune is None

    @property
    def choosing(self) -> Path:
        """The annotation file that heads are chosen on."""
        return self.tune or self.val

    def check(self) -> None:
        """
        Raises:
            MissingFileError: a file or the folder is not there. SettingError: train is also a split to judge on.
        """
        for path in self.files:
            require(path, "annotation file")
        require(self.images, "folder of pictures", "--images is where file_name of the annotation files begins")
        names = [path.resolve() for path in self.files]
        if len(set(names)) < len(names):
            raise SettingError("one annotation file is given twice", hint="heads are judged on images of their own")

    @property
    def files(self) -> tuple[Path, ...]:
        """All annotation files."""
        return tuple(path for path in (self.train, self.tune, self.val) if path is not None)


@dataclass(frozen=True)
class Frozen:
    """The detector as ``calib extract`` takes it: FRAMEWORK:SPEC, and weights and arguments of a factory."""

    spec: str
    weights: Path | None = None
    arguments: str = ""

    @property
    def checkpoint(self) -> Path | None:
        """The file or folder that its weights are in, where that can be seen."""
        named = Path(self.spec.partition(":")[2])
        is_one = named.suffix in (".safetensors", ".pth", ".pt", ".pkl") or named.is_dir()
        return self.weights or (named if is_one and named.exists() else None)

    @property
    def framework(self) -> str:
        """What is before the colon."""
        return self.spec.partition(":")[0]

    def identity(self) -> dict[str, Any]:
        """What the cache depends on: the description, and the content of the files that it names."""
        files = [self.weights, Path(self.spec.partition(":")[2])]
        return {"spec": self.spec, "arguments": self.arguments, "files": [_content(p) for p in files if p is not None]}


@dataclass(frozen=True)
class Search:
    """How long and for what, as ``calib.tune.plan.Plan`` has it. With folds each search has its share of the budget.
    Heads are chosen and judged at ``max_detections`` per image, the detector's own cap if None."""

    budget: str = "30m"
    objective: str = "AP"
    methods: tuple[str, ...] = ()
    steps: int = 4500
    finalists: int = 3
    seeds: int = 3
    stacked: int = 36
    control_trials: int = 8
    seed: int = 0
    max_detections: int | None = None

    def __post_init__(self) -> None:
        self.plan(1)

    def plan(self, searches: int) -> Plan:
        """Of one of so many searches.

        Raises:
            SettingError: no such budget or objective.
        """
        Objective.parse(self.objective)
        budget = budget_of(self.budget)
        share = {k: max(1, round(v / searches)) if k == "trials" else v / searches for k, v in budget.items()}
        return Plan(
            self.objective, self.methods, **share, steps=self.steps, finalists=self.finalists, seeds=self.seeds,
            stacked=self.stacked, seed=self.seed, max_detections=self.max_detections,
        )  # fmt: skip


@dataclass(frozen=True)
class HeadTable:
    """Heads with fixed settings that are trained and judged beside the chosen one: learned ones from ``seeds`` seeds,
    at each of ``caps`` detections per image (none: the one that the chosen head is judged at)."""

    entries: tuple[Entry, ...]
    seeds: int = 1
    caps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds < 1 or any(cap < 1 for cap in self.caps):
            raise SettingError("seeds and caps of a table must be at least 1", hint="--seeds 3 --caps 300,100")
        if taken := [e.name for e in self.entries if e.name in NAMES]:
            raise SettingError(f"[{taken[0]}] is the name of a head of every run", hint="call the row otherwise")


@dataclass(frozen=True)
class Request:
    """An improvement of ``detector`` on ``data``, written to ``out``.

    ``folds`` and ``group_by`` (as ``calib.data.groups.read_groups``) are for a ``val`` alone. ``replicates`` is the
    number of bootstrap replicates behind the intervals. ``doctor``: data and detector are examined first, and errors
    that are found end the run. ``table``: heads of the user's to be judged beside.
    """

    detector: Frozen
    data: Data
    out: Path
    search: Search = field(default_factory=Search)
    folds: int = 2
    group_by: str = ""
    replicates: int = 1000
    device: str = "auto"
    processes: int = 1
    doctor: bool = True
    table: HeadTable | None = None

    def __post_init__(self) -> None:
        check_replicates(self.replicates)
        if not 2 <= self.folds <= 10:
            raise SettingError(f"folds is {self.folds}: expected 2 to 10", hint="the option --folds")
        if self.group_by and not self.data.is_crossed:
            raise SettingError("groups are of folds: with --tune nothing is divided", hint="no --group-by")

    @property
    def folder(self) -> RunFolder:
        """What lies where in ``out``."""
        return RunFolder(self.out)

    @property
    def searches(self) -> int:
        """How many searches there are: one, and one more for each fold."""
        return 1 + self.folds * self.data.is_crossed

    @property
    def baseline(self) -> str:
        """The head that the others are compared with: the row of the table that is called so, else the control."""
        rows = () if self.table is None else [e.name for e in self.table.entries]
        return CONVERGED if CONVERGED in rows else CONTROL

    @property
    def judged(self) -> list[str]:
        """Names of all heads that are judged, with those of the table from its first seed; the baseline first."""
        names = [*NAMES, *(() if self.table is None else (e.name for e in self.table.entries))]
        return [self.baseline, *(name for name in names if name != self.baseline)]

    @property
    def beside(self) -> dict[str, str]:
        """Heads of the run that stand in its table, each with what it is: the chosen one, and without a control among
        the rows of the table the detector and the control, too."""
        judged = CALIBRATED if self.data.is_crossed else CHOSEN
        own = {judged: "chosen on tune from a search" if self.data.tune else "chosen from a search, by folds"}
        first = {DETECTOR: "the detector as it is", CONTROL: "the detector's layer trained on without balancing"}
        return own if self.baseline == CONVERGED else first | own

    @property
    def place(self) -> str:
        """Where torch computes."""
        return str(choose_device(self.device))


def _content(path: Path) -> str:
    """Hash of a file, or of all files below a folder; empty where there is none."""
    if path.is_file():
        return hash_file(path)
    h = xxhash.xxh3_64()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else ():
        h.update(f"{file.relative_to(path)} {hash_file(file)}".encode())
    return h.hexdigest() if path.is_dir() else ""
