"""The names of files and folders that calib writes: caches, heads, results, studies, runs. No other module spells them.

What is in the files stands in the modules that write them. ``{}`` stands for a part that varies.
"""

from pathlib import Path
from typing import Self

# A feature cache (calib.cache.schema). The files of a shard are those of the first stage; see ``of_stage`` there.
MANIFEST = "manifest.json"  # what the cache is, and which shards and tables it has; written last
CATEGORIES = "categories.parquet"  # one row per foreground class
IMAGES = "images.parquet"  # one row per image: where its proposals lie
ANNOTATIONS = "annotations.parquet"  # the split's ground truth, if it is annotated
CLASSIFIER = "classifier.safetensors"  # the frozen detector's
SHARDS = "shards"  # the folder of shards: SHARDS/00000/META and so on
META = "meta.parquet"  # one row per proposal
FEATURES = "features.parquet"  # the input of the classifier
LOGITS = "logits.parquet"  # the detector's own
MAPS = "maps.parquet"  # RoI maps, where they were asked for
HIDDEN_LOCK = ".lock"  # held by who writes there; so in caches, staging folders, pieces and the mirror
VERIFIED = ".verified.json"  # sizes and times of the files whose content was verified
DAMAGED = "damaged"  # the folder of what a repair took out

# What is written to an object store, while it is written.
WRITING = ".{}.writing"  # the folder beside it, which goes when it is done
LEASE = "lease-"  # and a number: who writes
REQUEST = "request.json"  # the manifest of a cache, without shards: what is asked for

# A head (calib.artifact): MODELS/NAME/VERSION.
DESCRIPTION = "head.json"  # everything but the tensors
TENSORS = "head.safetensors"  # all tensors
MODELS = "models"  # a folder of heads, as calib serve takes it
FIRST = "1"  # the first version of a head
TRAINING = ".{}.training"  # the folder beside a head that is trained: its checkpoints
STATE = "state.json"  # of a checkpoint: the step, and what is asked for
BASE = ".{}.base"  # the folder beside a head: the base that is trained for it

# Detections and results (calib.score, calib.evaluate).
PIECES = ".{}.pieces"  # the folder beside a file of detections that is written: its finished pieces
PER_CATEGORY = "per_category.parquet"  # one row per category
SUMMARY = "summary.json"  # the metrics; of a run of calib improve, all that came of it
MATCHES = "matches.parquet"  # one row per detection, where asked for

# A study (calib.tune).
STUDY = "study.json"  # what is searched for
JOURNAL = "optuna.journal"  # the memory of the search: trials and what came of them
TRIALS = "trials.parquet"  # one row per run of a trial
RESULT = "result.json"  # the outcome: candidates, the chosen one
HEADS = "heads"  # heads of whole trainings: HEADS/TRIAL/VERSION
SHORT = "short"  # heads of short trainings, for as long as they are judged
CHOSEN_HEAD = f"{MODELS}/chosen/{FIRST}"  # the best head
LOCK = "lock"  # held by who writes a study, a run or checkpoints


class RunFolder:
    """A run of ``calib improve``; a fold of it has ``models`` and ``search`` of its own in the same way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / LOCK
        self.steps = path / "steps"  # a record of each step: its inputs, its result
        self.models = path / MODELS  # the heads, ready to serve
        self.control = path / "control"  # the study that the control is chosen in
        self.search = path / "search"  # the study of the search
        self.folds = path / "folds"  # annotation files of folds, and the folder of each
        self.rest = path / "cache"  # of a fold: the cache of all images outside it
        self.results = path / "results"  # a result folder for each head
        self.export = path / "export"  # the chosen head in another form
        self.table = path / "table.md"  # metrics of the heads of a table
        self.report = path / "report.html"  # the page
        self.summary = path / SUMMARY
        self.commands = path / "commands.sh"  # the run as single commands

    def cache(self, split: str) -> Path:
        """The cache of a split."""
        return self.path / "caches" / split

    def head(self, name: str, version: str = FIRST) -> Path:
        """A head that can be served."""
        return self.models / name / version

    def detections(self, run: str) -> Path:
        """The detections of a head on val; of ``FOLD/NAME``, of that fold's head."""
        return self.path / "detections" / f"{run}.parquet"

    def results_at(self, cap: int) -> Path:
        """Result folders at a cap of a table."""
        return self.path / f"results-{cap}"

    def part(self, name: str) -> Path:
        """The annotation file of a fold, or of all images outside it."""
        return self.folds / f"{name}.json"

    def fold(self, name: str) -> Self:
        """What was chosen without a fold."""
        return type(self)(self.folds / name)
