"""Files, columns and metadata of cache formats 1 and 2 (cascades); the names of the files stand in ``calib.layout``.

::

    CACHE/
      manifest.json            this module's ``Manifest``; written last, lists the committed shards
      categories.parquet       one row per foreground class
      images.parquet           one row per image: where its proposals lie
      annotations.parquet      the split's ground truth, if it is annotated
      classifier.safetensors   weight [C+1, D], bias [C+1], ... of the frozen detector, background last
      shards/00000/meta.parquet       one row per proposal; its images in the schema's metadata, as JSON
      shards/00000/features.parquet   one required FixedSizeBinary column: the input of the classifier
      shards/00000/logits.parquet     likewise [C+1]; `full`: every row, `probe`: the first rows, in float32
      shards/00000/maps.parquet       likewise the RoI map [channels * height * width], where asked for

Of a cascade (format 2) these are the files of the first stage; ``meta.1.parquet``, ``features.1.parquet`` ... are those
of the next ones. Row i of a shard is the same RoI in all of them: (RoI, stage) is a row of one of the files. The
classifier's next stages are ``stage1.weight`` ...

In an archive (layout: archive) the matrices are compressed and cannot be mapped; ``archive.py`` brings them back.

Not guaranteed: the order of shards on disk, the number of rows per shard, any file that the manifest does not list.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from calib.annotations import STYLES
from calib.errors import FormatError, MissingFileError, SettingError, VersionError
from calib.files import read_json, write_json
from calib.layout import MANIFEST
from calib.settings import at_least, one_of

FORMAT = "calib-cache"
VERSION, CASCADE_VERSION = 1, 2  # an older calib must not take the first stage for the whole

MODES = ("train", "test")
DTYPES = ("float16", "float32")
# Activation -> logits beyond the C classes: background; none; object and background, with a softmax of their own.
EXTRA_LOGITS = {"softmax": 1, "sigmoid": 0, "seesaw": 2}
ACTIVATIONS = tuple(EXTRA_LOGITS)
LOGITS_KEPT = ("full", "probe", "none")
LAYOUTS = ("mapped", "archive")
AVERAGES = ("probabilities", "logits")

PROPOSAL_BOX = ("proposal_x1", "proposal_y1", "proposal_x2", "proposal_y2")
REFINED_BOX = ("refined_x1", "refined_y1", "refined_x2", "refined_y2")
IGNORE = -1
NO_ANNOTATION = -1


def of_stage(name: str, stage: int) -> str:
    """The file of a shard that holds for ``stage`` what ``name`` holds for the first one."""
    return name.replace(".", f".{stage}.", 1) if stage else name


def _required(*columns: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


META_SCHEMA = _required(
    ("image_id", pa.int64()),
    ("roi_id", pa.int32()),  # rank among the image's proposals, as the detector ordered them
    ("stage", pa.int8()),  # cascade stage, 0 where there is one
    *((name, pa.float32()) for name in PROPOSAL_BOX),  # network pixels
    *((name, pa.float32()) for name in REFINED_BOX),  # network pixels, clipped; NaN where boxes are class-specific
    ("objectness", pa.float32()),  # in [0, 1]; 1 for an appended ground-truth box
    ("label", pa.int32()),  # 0..C-1, C = background, -1 = ignore
    ("max_iou", pa.float32()),  # with the best ground-truth box of any class
    ("gt_id", pa.int64()),  # its annotation id, -1 where the image has none
    ("is_gt", pa.bool_()),  # the proposal is a ground-truth box that was appended
)

IMAGES_SCHEMA = _required(
    ("image_id", pa.int64()),
    ("shard", pa.string()),
    ("row_start", pa.int64()),  # within the shard
    ("n_rows", pa.int64()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("net_height", pa.int32()),
    ("net_width", pa.int32()),
    ("neg_category_ids", pa.list_(pa.int64())),
    ("not_exhaustive_category_ids", pa.list_(pa.int64())),
)

ANNOTATIONS_SCHEMA = _required(
    ("id", pa.int64()),
    ("image_id", pa.int64()),
    ("category_id", pa.int64()),
    *((name, pa.float64()) for name in ("x1", "y1", "x2", "y2")),  # pixels of the original image
    ("area", pa.float64()),
    ("ignore", pa.bool_()),  # the annotation's own flag; in caches without ``crowd``, or a crowd
    *((name, pa.float64()) for name in ("width", "height")),  # as annotated: corners are rounded
    ("crowd", pa.bool_()),  # COCO's iscrowd
)
# Columns that caches of an older calib lack.
LATER_ANNOTATION_COLUMNS = ("width", "height", "crowd")

CATEGORIES_SCHEMA = _required(
    ("index", pa.int32()),
    ("category_id", pa.int64()),
    ("name", pa.string()),
    ("instance_count", pa.int64()),
    ("image_count", pa.int64()),
    ("frequency", pa.string()),
)


@dataclass(frozen=True)
class Shard:
    """A committed shard: its row count (of one stage) and, per file name, bytes and xxh3-64 hash (in an archive also
    those of the mapped file, under ``unpacked``)."""

    name: str
    rows: int
    images: int
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Detector:
    """What is known of the frozen detector.

    ``digest`` identifies its classifier: heads refuse caches of another detector. ``background_first`` says where the
    source keeps its background column (our files always keep it last). Boxes are suppressed in ``nms_space``; of a
    detector that ``clips_last`` boxes are cut at the edges of the picture after suppression, and stored uncut. Of a
    cascade of several ``stages`` detections have the boxes of the last one (``box_weights`` are its) and scores whose
    ``average`` over stages is that of probabilities or of logits.
    """

    source: str
    digest: str
    num_classes: int
    feature_size: int
    head_type: str = "linear"
    activation: str = "softmax"
    background_first: bool = False
    class_agnostic: bool = True
    box_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    nms_space: str = "network"
    score_threshold: float = 1e-4
    nms_iou: float = 0.5
    max_detections: int = 300
    min_box_side: float = 0.0
    stages: int = 1
    average: str = "probabilities"
    clips_last: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        """Columns of its logits: C + 1; C of a sigmoid detector, which has no background column; C + 2 of a seesaw
        detector, whose last two are object and background."""
        return self.num_classes + EXTRA_LOGITS[self.activation]

    @property
    def logits_size(self) -> int:
        """Columns of its logits in all stages."""
        return self.stages * self.outputs


@dataclass(frozen=True)
class Manifest:
    """Everything about a cache that is not a row.

    ``proof``: on how many ``images`` with how many ``detections`` the detector's own were compared with those of the
    rows, and the ``largest_difference`` of two scores; no images where that was not wanted, empty where no detector was
    at hand. ``style``: what the annotation file says of an image's categories (``calib.annotations.STYLES``); empty in
    caches of a calib that did not write it.
    """

    mode: str
    dtype: str
    logits: str
    detector: Detector
    source: dict[str, Any]
    roi_maps: tuple[int, ...] = ()  # channels, height, width; empty where maps were not asked for
    shards: tuple[Shard, ...] = ()
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a complete cache: bytes and xxh3 per file
    complete: bool = False
    layout: str = "mapped"
    format: str = FORMAT
    proof: dict[str, Any] = field(default_factory=dict)
    style: str = ""

    @property
    def version(self) -> int:
        """Of the format."""
        return CASCADE_VERSION if self.detector.stages > 1 else VERSION

    @property
    def rows(self) -> int:
        """Number of proposals in all committed shards; a cascade has as many rows in each stage."""
        return sum(s.rows for s in self.shards)

    @property
    def digest(self) -> str:
        """Identifies the content: two caches with equal digests hold equal rows."""
        parts = [f"{s.name}{f}{d['xxh3']}" for s in self.shards for f, d in sorted(s.files.items())]
        return xxhash.xxh3_64("".join([self.detector.digest, *parts]).encode()).hexdigest()

    def proof_text(self) -> str:
        """``proof`` in words."""
        p = self.proof
        if not p.get("images"):
            return "not compared with the detector's own detections"
        return (
            f"gives the detector's own {p['detections']} detections on {p['images']} images, scores to "
            f"{p['largest_difference']:.1g}"
        )

    def request(self) -> dict[str, Any]:
        """What was asked for, without what has been done: two runs with equal requests write equal caches."""
        plain = json.loads(json.dumps(asdict(self)))
        return {k: v for k, v in plain.items() if k not in ("shards", "tables", "complete", "proof")}

    def write(self, cache: Path) -> None:
        """Replace ``cache/manifest.json`` in one step."""
        write_json(cache / MANIFEST, self.document())

    def document(self) -> dict[str, Any]:
        """What stands in the file."""
        return asdict(self) | {"version": self.version}

    @classmethod
    def read(cls, cache: Path) -> "Manifest":
        """Read ``cache/manifest.json``.

        Raises:
            MissingFileError: not there. FormatError: damaged. VersionError: another format version.
        """
        if not (cache / MANIFEST).is_file():
            raise MissingFileError(
                f"no feature cache at {cache}: {MANIFEST} is missing", hint="write one with calib extract"
            )
        data = read_json(cache / MANIFEST, "cache manifest")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(f"{cache / MANIFEST} is not a calib feature cache", hint="write one with calib extract")
        if data.get("version") not in (VERSION, CASCADE_VERSION):
            raise VersionError(
                f"cache {cache} has format version {data.get('version')}; this calib reads versions {VERSION} and "
                f"{CASCADE_VERSION}",
                hint="extract it again, or use the calib release that wrote it",
            )
        try:
            return cls.parse(data)
        except (KeyError, TypeError, ValueError, SettingError) as e:
            raise FormatError(
                f"cache manifest {cache / MANIFEST} is damaged: {e!r}", hint="extract the cache again"
            ) from e

    @classmethod
    def parse(cls, data: dict[str, Any]) -> "Manifest":
        """What ``document`` gave.

        Raises:
            KeyError, TypeError, ValueError, SettingError: it did not.
        """
        known = {f.name for f in fields(cls)}
        detector = dict(data["detector"], box_weights=tuple(data["detector"]["box_weights"]))
        shards = tuple(Shard(**s) for s in data["shards"])
        plain = {k: v for k, v in data.items() if k in known}
        plain["roi_maps"] = tuple(int(n) for n in data.get("roi_maps", ()))
        plain["proof"] = dict(data.get("proof", {}))
        manifest = cls(**(plain | {"detector": Detector(**detector), "shards": shards}))
        one_of(manifest, "mode", MODES)
        one_of(manifest, "dtype", DTYPES)
        one_of(manifest, "logits", LOGITS_KEPT)
        one_of(manifest, "layout", LAYOUTS)
        one_of(manifest, "style", ("", *STYLES))
        one_of(manifest.detector, "activation", ACTIVATIONS)
        one_of(manifest.detector, "average", AVERAGES)
        at_least(manifest.detector, 1, "num_classes", "feature_size", "stages")
        for shard in shards:
            at_least(shard, 0, "rows", "images")
        return manifest
