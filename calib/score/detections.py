"""Detections as files: Parquet for us and for SQL, results json for LVIS; written in pieces, so that a run can go on.

Letters: K detections.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from calib.artifact import Artifact
from calib.cache import Cache
from calib.errors import ExistsError, InputError, NonFiniteError, UnsupportedError
from calib.files import check_replaceable, is_calib_folder, replacing, require
from calib.parallel.part import Part
from calib.parallel.pieces import Pieces
from calib.parallel.ray_engine import RayEngine
from calib.progress import Bar, Progress, silent
from calib.score.scorer import ImageDetections, Scorer
from calib.settings import Nms

DETECTIONS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        *(pa.field(n, pa.float32(), nullable=False) for n in ("x1", "y1", "x2", "y2")),  # original pixels
        pa.field("roi_id", pa.int32(), nullable=False),
    ]
)
IMAGES_PER_PIECE = 64
_ORIGIN = "calib.detections"


@dataclass(frozen=True)
class Output:
    """One head's detections: what computes them and where they go, as Parquet and perhaps as LVIS results json."""

    artifact: Artifact
    nms: Nms
    parquet: Path
    results_json: Path | None = None

    def check_paths(self) -> None:
        """
        Raises:
            InputError: one name for both files, or that of a JSON file for Parquet. ExistsError: a folder or a device
                stands where a file is to be written, or the place is inside a head or a cache.
        """
        if self.results_json is not None and self.results_json.resolve() == self.parquet.resolve():
            raise InputError(
                f"detections and results json would both be written to {self.parquet}", hint="name two files"
            )
        for path in (self.parquet, *([self.results_json] if self.results_json else [])):
            check_replaceable(path)
            for folder in (parent for parent in path.resolve().parents if is_calib_folder(parent)):
                raise ExistsError(f"{path} lies inside the head or cache {folder}", hint="name a file outside it")
        if self.parquet.suffix == ".json":
            raise InputError(
                f"{self.parquet} would hold Parquet under the name of a JSON file",
                hint=f"--out {self.parquet.with_suffix('.parquet')} --results-json {self.parquet}",
            )

    def pieces(self, cache: Cache, images_per_piece: int) -> Pieces:
        """Where finished pieces wait for the others."""
        request = self.origin(cache) | {"images_per_piece": images_per_piece}
        return Pieces(self.parquet, request, -(-len(cache.images) // images_per_piece), ".parquet")

    def origin(self, cache: Cache) -> dict[str, Any]:
        """What stands in the metadata of the file."""
        info = self.artifact.info
        more = {"head": self.head_digest, "nms": asdict(self.nms)}
        return {"cache": cache.digest, "method": info.method, "seed": info.seed} | more

    def is_written(self, cache: Cache) -> bool:
        """Whether the files are there already, of this cache, head and thresholds."""
        if not self.parquet.is_file() or (self.results_json is not None and not self.results_json.is_file()):
            return False
        try:
            metadata = pq.read_schema(self.parquet).metadata or {}
        except pa.ArrowInvalid:
            return False
        return metadata.get(_ORIGIN.encode()) == json.dumps(self.origin(cache)).encode()

    @cached_property
    def head_digest(self) -> str:
        """Of all tensors of the head."""
        digest = xxhash.xxh3_64()
        for name, tensor in sorted(self.artifact.head.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()


def write_detections(
    cache: Cache, outputs: Sequence[Output], engine: RayEngine | None = None, *, progress: Progress = silent
) -> list[int]:
    """Score ``cache`` with every output's head in one pass and write its files; returns numbers of detections.

    Files appear whole or not at all. Pieces of finished images are kept beside them until then: after an interruption
    the same call goes on behind them, and it scores nothing again that ``write_part`` has scored. With an ``engine``
    its workers write the pieces.

    Raises:
        CalibError: as ``Output.check_paths``, ``Scorer`` and ``RayEngine.run``. ExistsError: another process writes one
            of the files.
    """
    work, scorer = _Work.of(cache, outputs), Scorer(cache)
    with ExitStack() as stack:
        for pieces in work.pieces(cache):
            stack.enter_context(pieces.held())
        todo = work.missing(cache)
        try:
            with progress("score", total=len(scorer), unit="images") as bar:
                bar.advance(len(scorer) - sum(len(work.images(k, cache)) for k in todo))
                if engine is None:
                    for number in todo:
                        work.write(scorer, cache, number, bar)
                else:
                    engine.run(work, todo, bar.advance)
        except (NonFiniteError, UnsupportedError):  # nothing to go on with: the cache or the head must change first
            for pieces in work.pieces(cache):
                pieces.remove()
            raise
        return [_join(o, cache, p) for o, p in zip(outputs, work.pieces(cache), strict=True)]


def write_part(cache: Cache, outputs: Sequence[Output], part: Part, *, progress: Progress = silent) -> int:
    """Write the pieces of one part of the images, which ``write_detections`` joins; returns the number of its images.

    Parts may be written at the same time, by processes of any machine that has the folder. Pieces that are there, and
    files that are whole, are left alone.

    Raises:
        CalibError: as ``Output.check_paths`` and ``Scorer``. ExistsError: another process joins the pieces.
    """
    _Work.of(cache, outputs)  # refuses wrong paths
    work, scorer = _Work.of(cache, [o for o in outputs if not o.is_written(cache)]), Scorer(cache)
    numbers = part.of(-(-len(scorer) // work.images_per_piece))
    own = sum(len(work.images(k, cache)) for k in numbers)
    with ExitStack() as stack:
        for pieces in work.pieces(cache):
            stack.enter_context(pieces.held(shared=True))
        todo = work.missing(cache, numbers)
        with progress("score", total=own, unit="images") as bar:
            bar.advance(own - sum(len(work.images(k, cache)) for k in todo))
            for number in todo:
                work.write(scorer, cache, number, bar)
    return own


@dataclass(frozen=True)
class _Work:
    """Scoring in pieces, as it is sent to whoever does some of it."""

    cache: Path
    digest: str
    outputs: tuple[Output, ...]
    images_per_piece: int

    @classmethod
    def of(cls, cache: Cache, outputs: Sequence[Output]) -> "_Work":
        if len({output.parquet.resolve() for output in outputs}) < len(outputs):
            raise InputError("several heads would write the same file", hint="give each a name of its own")
        for output in outputs:
            output.check_paths()
        return cls(cache.path, cache.digest, tuple(outputs), IMAGES_PER_PIECE)

    def __call__(self) -> Callable[[int], int]:
        """Opens everything once, for any number of pieces: number of a piece -> images in it."""
        cache = Cache(self.cache)
        if cache.digest != self.digest:
            raise InputError(f"{self.cache} is another cache here", hint="all machines must see the same folders")
        scorer = Scorer(cache)
        for pieces in self.pieces(cache):
            require(pieces.folder, "folder of pieces", "all machines must see the same folders under the same names")
        return lambda number: self.write(scorer, cache, number)

    def pieces(self, cache: Cache) -> list[Pieces]:
        """Of every output."""
        return [output.pieces(cache, self.images_per_piece) for output in self.outputs]

    def missing(self, cache: Cache, numbers: range | None = None) -> list[int]:
        """Pieces that some output lacks."""
        return sorted({number for pieces in self.pieces(cache) for number in pieces.missing(numbers)})

    def images(self, number: int, cache: Cache) -> range:
        """Those of a piece."""
        first = number * self.images_per_piece
        return range(first, min(first + self.images_per_piece, len(cache.images)))

    def write(self, scorer: Scorer, cache: Cache, number: int, bar: Bar | None = None) -> int:
        """Score the images of a piece with the heads that have not done so before; returns how many they are."""
        left = [(o, p) for o, p in zip(self.outputs, self.pieces(cache), strict=True) if p.missing([number])]
        found: list[list[ImageDetections]] = []
        images = self.images(number, cache)
        for i in images if left else ():
            found.append(scorer.image(i, [(o.artifact.head, o.nms) for o, _ in left]))
            if bar is not None:
                bar.advance()
        for k, (_, pieces) in enumerate(left):
            with pieces.written(number) as temporary:
                table = _table([one[k] for one in found], cache.categories.category_id)
                pq.write_table(table, temporary, compression="zstd")
        return len(images)


def _join(output: Output, cache: Cache, pieces: Pieces) -> int:
    """Pieces into the files, in the order of images."""
    schema = DETECTIONS_SCHEMA.with_metadata({_ORIGIN: json.dumps(output.origin(cache))})
    count = 0
    with ExitStack() as stack:
        target = stack.enter_context(replacing(output.parquet))
        writer = stack.enter_context(pq.ParquetWriter(target, schema, compression="zstd"))
        json_file = stack.enter_context(_json_list(output.results_json)) if output.results_json else None
        for path in pieces.all():
            table = pq.read_table(path).replace_schema_metadata(schema.metadata)
            writer.write_table(table)
            count += len(table)
            if json_file is not None:
                json_file.add(_records(table))
    pieces.remove()
    return count


def _table(results: Sequence[ImageDetections], category_ids: NDArray[np.int64]) -> pa.Table:
    found = [r.detections for r in results]
    image_id = np.repeat(np.array([r.image_id for r in results], np.int64), [len(d.score) for d in found])
    box = np.concatenate([np.zeros((0, 4), np.float32), *(d.box.reshape(-1, 4) for d in found)])
    category = np.concatenate([np.zeros(0, np.int64), *(d.category for d in found)])
    score = np.concatenate([np.zeros(0, np.float32), *(d.score for d in found)])
    roi_id = np.concatenate([np.zeros(0, np.int32), *(r.roi_id for r in results)]).astype(np.int32)
    columns = [image_id, category_ids[category], score, *(box[:, k] for k in range(4)), roi_id]
    return pa.table(columns, schema=DETECTIONS_SCHEMA)


def _records(table: pa.Table) -> list[bytes]:
    """LVIS results: bbox is x, y, width, height."""
    c = {n: table[n].to_numpy() for n in table.column_names}
    x1, y1, x2, y2 = (c[n].astype(np.float64) for n in ("x1", "y1", "x2", "y2"))
    box = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).tolist()
    columns = zip(
        c["image_id"].tolist(),
        c["category_id"].tolist(),
        box,
        c["score"].astype(np.float64).tolist(),
        strict=True,
    )
    return [orjson.dumps({"image_id": i, "category_id": k, "bbox": b, "score": s}) for i, k, b, s in columns]


class _JsonList:
    def __init__(self, file: Any) -> None:
        self._file, self._first = file, True

    def add(self, records: list[bytes]) -> None:
        for r in records:
            self._file.write((b"\n" if self._first else b",\n") + r)
            self._first = False


@contextmanager
def _json_list(path: Path) -> Iterator[_JsonList]:
    """A JSON list written record by record."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(b"[")
        yield _JsonList(file)
        file.write(b"\n]\n")
