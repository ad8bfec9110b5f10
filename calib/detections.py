"""Detections as files: Parquet for us and for SQL, results json for LVIS; written in pieces, so that a run can go on.

Letters: K detections.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
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
from calib.errors import CalibError, ExistsError, InputError
from calib.files import is_calib_folder, lock, replacing, write_json
from calib.progress import Bar, Progress, silent
from calib.score import ImageDetections, Scorer
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
IMAGES_PER_PIECE = 256
_REQUEST = "request.json"


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
            InputError: one name for both files. ExistsError: a folder stands where a file is to be written, or the
                place is inside a head or a cache.
        """
        if self.results_json is not None and self.results_json.resolve() == self.parquet.resolve():
            raise InputError(
                f"detections and results json would both be written to {self.parquet}", hint="name two files"
            )
        for path in (self.parquet, *([self.results_json] if self.results_json else [])):
            if path.is_dir():
                raise ExistsError(f"{path} is a folder, expected the name of a file to write", hint="name a file in it")
            for folder in (parent for parent in path.resolve().parents if is_calib_folder(parent)):
                raise ExistsError(f"{path} lies inside the head or cache {folder}", hint="name a file outside it")

    @property
    def pieces(self) -> Path:
        """Where finished pieces wait for the others."""
        return self.parquet.with_name(f".{self.parquet.name}.pieces")

    def piece(self, number: int) -> Path:
        """One of them."""
        return self.pieces / f"{number:05d}.parquet"

    def origin(self, cache: Cache) -> dict[str, Any]:
        """What stands in the metadata of the file."""
        info = self.artifact.info
        return {"cache": cache.digest, "method": info.method, "seed": info.seed, "nms": asdict(self.nms)}

    @cached_property
    def head_digest(self) -> str:
        """Of all tensors of the head."""
        digest = xxhash.xxh3_64()
        for name, tensor in sorted(self.artifact.head.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        return digest.hexdigest()


def write_detections(cache: Cache, outputs: Sequence[Output], *, progress: Progress = silent) -> list[int]:
    """Score ``cache`` with every output's head in one pass and write its files; returns numbers of detections.

    Files appear whole or not at all. Pieces of finished images are kept beside them until then: after an interruption
    the same call goes on behind them.

    Raises:
        CalibError: as ``Output.check_paths`` and ``Scorer``. ExistsError: another process writes one of the files.
    """
    if len({output.parquet.resolve() for output in outputs}) < len(outputs):
        raise InputError("several heads would write the same file", hint="give each a name of its own")
    for output in outputs:
        output.check_paths()
    scorer = Scorer(cache)
    begun: list[Output] = []
    with ExitStack() as stack:
        try:
            for output in outputs:
                _begin(output, cache, stack)
                begun.append(output)
            with progress("score", total=len(scorer), unit="images") as bar:
                for number, first in enumerate(range(0, len(scorer), IMAGES_PER_PIECE)):
                    images = range(first, min(first + IMAGES_PER_PIECE, len(scorer)))
                    _write_piece(scorer, cache, number, images, outputs, bar)
        except CalibError:  # nothing to go on with: the cache or the head must change first
            for output in begun:
                shutil.rmtree(output.pieces)
            raise
        return [_join(output, cache, -(-len(scorer) // IMAGES_PER_PIECE)) for output in outputs]


def _write_piece(scorer: Scorer, cache: Cache, number: int, images: range, outputs: Sequence[Output], bar: Bar) -> None:
    """Score ``images`` with the heads that have not done so before."""
    left = [output for output in outputs if not output.piece(number).exists()]
    found: list[list[ImageDetections]] = []
    for i in images if left else ():
        found.append(scorer.image(i, [(o.artifact.head, o.nms) for o in left]))
        bar.advance()
    bar.advance(len(images) - len(found))
    for k, output in enumerate(left):
        with replacing(output.piece(number)) as temporary:
            table = _table([one[k] for one in found], cache.categories.category_id)
            pq.write_table(table, temporary, compression="zstd")


def _begin(output: Output, cache: Cache, stack: ExitStack) -> None:
    """Lock the folder of pieces; those of another cache, head or thresholds are removed."""
    output.pieces.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock(output.pieces / ".lock", f"writing {output.parquet}"))
    request = output.origin(cache) | {"head": output.head_digest, "images_per_piece": IMAGES_PER_PIECE}
    path = output.pieces / _REQUEST
    if not path.exists() or path.read_text() != json.dumps(request, indent=1) + "\n":
        for piece in output.pieces.glob("*.parquet"):
            piece.unlink()
        write_json(path, request)


def _join(output: Output, cache: Cache, pieces: int) -> int:
    """Pieces into the files, in the order of images."""
    schema = DETECTIONS_SCHEMA.with_metadata({"calib.detections": json.dumps(output.origin(cache))})
    count = 0
    with ExitStack() as stack:
        target = stack.enter_context(replacing(output.parquet))
        writer = stack.enter_context(pq.ParquetWriter(target, schema, compression="zstd"))
        json_file = stack.enter_context(_json_list(output.results_json)) if output.results_json else None
        for number in range(pieces):
            table = pq.read_table(output.piece(number)).replace_schema_metadata(schema.metadata)
            writer.write_table(table)
            count += len(table)
            if json_file is not None:
                json_file.add(_records(table))
    shutil.rmtree(output.pieces)
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
