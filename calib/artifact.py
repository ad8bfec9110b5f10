"""A fitted head on disk: ``NAME/VERSION/`` with ``head.safetensors`` (tensors) and ``head.json`` (everything else).

No pickle: loading an artifact runs none of its content. The JSON names the head's kind, looked up in
``registry.HEADS``; the hash of the tensors stands in it, so that a damaged file is refused.

Importing this module imports no torch: ``describe`` is enough for whoever only wants to know what a head is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from calib import __version__
from calib.cache import Cache
from calib.cache.schema import EXTRA_LOGITS
from calib.errors import CalibError, ExistsError, FormatError, InputError, UnsupportedError, VersionError
from calib.files import fsync_dir, read_json, require
from calib.layout import DESCRIPTION, TENSORS
from calib.tables import Rows, Tables

if TYPE_CHECKING:
    from calib.heads.base import Head

FORMAT = "calib-head"
VERSION = 1


@dataclass(frozen=True)
class HeadInfo:
    """Where a head comes from and what its columns mean; ``processes`` trained it together; ``base``: the heads that it
    is built on, the nearest first: method, settings, seed and digest of each."""

    method: str
    settings: dict[str, Any]
    seed: int
    cache_digest: str
    detector_digest: str
    category_ids: list[int]
    category_names: list[str]
    instance_counts: list[int]
    detector: dict[str, Any] = field(default_factory=dict)
    losses: list[list[float]] = field(default_factory=list)
    processes: int = 1
    calib_version: str = __version__
    base: list[dict[str, Any]] = field(default_factory=list)

    @property
    def logits_size(self) -> int:
        """Columns of the detector's logits, of all stages of a cascade."""
        outputs = len(self.category_ids) + EXTRA_LOGITS[self.detector.get("activation", "softmax")]
        return int(self.detector.get("stages", 1)) * outputs

    @classmethod
    def of(
        cls,
        cache: Cache,
        method: str,
        settings: dict[str, Any],
        seed: int,
        losses: list[tuple[int, float]],
        processes: int = 1,
        base: Artifact | None = None,
    ) -> HeadInfo:
        """Describe a head fitted on ``cache``, built on ``base``."""
        categories, manifest = cache.categories, cache.manifest
        keep = (
            "source",
            "score_threshold",
            "nms_iou",
            "max_detections",
            "min_box_side",
            "class_agnostic",
            "background_first",
            "activation",
            "stages",
            "average",
        )
        return cls(
            method=method,
            settings=settings,
            seed=seed,
            cache_digest=cache.digest,
            detector_digest=manifest.detector.digest,
            category_ids=categories.category_id.tolist(),
            category_names=list(categories.name),
            instance_counts=categories.instance_count.tolist(),
            detector={k: getattr(manifest.detector, k) for k in keep}
            | {"box_weights": list(manifest.detector.box_weights), "proof": manifest.proof},
            losses=[[int(s), float(v)] for s, v in losses],
            processes=processes,
            base=[] if base is None else base.chain(),
        )


@dataclass(frozen=True)
class Artifact(Tables):
    """A head with its description."""

    head: Head
    info: HeadInfo

    def digest(self) -> str:
        """Identifies what the head computes: its tensors and its form."""
        form = json.dumps(self.head.description(), sort_keys=True).encode()
        return str(xxhash.xxh3_64(_tensors(self.head) + form).hexdigest())

    def chain(self) -> list[dict[str, Any]]:
        """This head and those that it is built on, as ``HeadInfo.base`` of the next has them."""
        return [self._origin() | {"digest": self.digest()}, *self.info.base]

    def part(self) -> dict[str, Any]:
        """This head as the settings of one that is composed of it have it."""
        return self._origin() | ({"base": self.info.base} if self.info.base else {})

    def _origin(self) -> dict[str, Any]:
        return {k: getattr(self.info, k) for k in ("method", "settings", "seed")}

    def tables(self) -> list[tuple[str, Rows]]:
        """One row."""
        settings = ", ".join(f"{k}={v}" for k, v in self.info.settings.items())
        row = {"method": self.info.method, "seed": self.info.seed, "classes": self.head.num_classes}
        if self.info.base:
            row["base"] = " on ".join(link["method"] for link in self.info.base)
        return [("head", [row | {"features": self.head.feature_size, "settings": settings}])]


def _check_outermost(head: Head) -> None:
    """Maps by box size take detections, which no head around them has."""
    if any(getattr(inner, "kind", "") == "by-size" for inner in head.modules() if inner is not head):
        raise UnsupportedError(
            f"a head of kind '{head.kind}' takes the scores of proposals; one with maps by box size maps detections",
            hint="calibrate --by size comes last",
        )


def save(path: Path, artifact: Artifact, *, overwrite: bool = False) -> None:
    """Write ``path/head.json`` and ``path/head.safetensors`` in one step (the folder appears whole or not at all).

    Raises:
        ExistsError: as ``check_free``. UnsupportedError: maps by box size lie inside another head.
    """
    check_free(path, overwrite=overwrite)
    _check_outermost(artifact.head)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors = _tensors(artifact.head)
    digest = xxhash.xxh3_64(tensors).hexdigest()
    description = {"format": FORMAT, "version": VERSION, "tensors_xxh3": digest}
    description |= {"feature_size": artifact.head.feature_size}
    description |= {"head": artifact.head.description(), "info": asdict(artifact.info)}
    _write(temporary / TENSORS, tensors)
    _write(temporary / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    fsync_dir(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _tensors(head: Head) -> bytes:
    from safetensors.torch import save as save_tensors

    return bytes(save_tensors({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}))


def check_free(path: Path, *, overwrite: bool) -> None:
    """Whether a head may be written to ``path``.

    Raises:
        ExistsError: ``path`` exists and ``overwrite`` is not set, or something else than a head stands there.
    """
    if not path.exists():
        return
    if not overwrite:
        raise ExistsError(f"{path} exists", hint="choose another version folder, or add --overwrite")
    if not path.is_dir() or {p.name for p in path.iterdir()} - {DESCRIPTION, TENSORS}:
        raise ExistsError(f"{path} is no head folder: it is not replaced", hint="choose another --out")


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


@dataclass(frozen=True)
class Description:
    """What a head folder says of itself; ``tensors`` are the bytes of its checked safetensors file."""

    kind: str
    config: dict[str, Any]
    info: HeadInfo
    feature_size: int | None  # None: written before this stood in the file
    tensors: bytes = field(repr=False)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(array.size for array in load_arrays(self.tensors).values())


def describe(path: Path) -> Description:
    """Read and check an artifact folder without building its head.

    Raises:
        MissingFileError: not there. FormatError: damaged or foreign. VersionError: another format version.
    """
    where = require(require(path, "head") / DESCRIPTION, "head description", "a head folder is MODELS/NAME/VERSION")
    description = read_json(where, "head description")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise FormatError(f"{path / DESCRIPTION} does not describe a calib head", hint="write one with calib train")
    if description.get("version") != VERSION:
        raise VersionError(
            f"head {path} has format version {description.get('version')}; this calib reads version {VERSION}"
        )
    content = require(path / TENSORS, "head tensors").read_bytes()
    if xxhash.xxh3_64(content).hexdigest() != description.get("tensors_xxh3"):
        raise FormatError(
            f"{path / TENSORS} is damaged: its content is not what was written", hint="train the head again"
        )
    try:
        head, info = description["head"], HeadInfo(**description["info"])
        return Description(head["kind"], head["config"], info, description.get("feature_size"), content)
    except (KeyError, TypeError) as e:
        raise FormatError(f"head {path} cannot be loaded: {e}", hint="train the head again") from e


def load(path: Path) -> Artifact:
    """Read an artifact folder; the head is in eval mode.

    Raises:
        MissingFileError, FormatError, VersionError: as ``describe``.
    """
    from safetensors.torch import load as load_tensors

    from calib.heads.base import head_from

    described = describe(path)
    try:
        head = head_from({"kind": described.kind, "config": described.config})
        head.load_state_dict(load_tensors(described.tensors))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, CalibError) as e:
        raise FormatError(f"head {path} cannot be loaded: {e}", hint="train the head again") from e
    info = described.info
    if head.num_classes != len(info.category_ids):
        raise FormatError(f"head {path} has {head.num_classes} classes and {len(info.category_ids)} category ids")
    return Artifact(head.eval().requires_grad_(False), info)


def check_fits(artifact: Artifact, cache: Cache, path: Path) -> None:
    """Raise InputError unless the head was fitted for the detector that wrote ``cache``."""
    ours, theirs = artifact.info.detector_digest, cache.manifest.detector.digest
    if ours != theirs:
        raise InputError(
            f"head {path} was fitted for detector {ours}; cache {cache.path} was written by detector {theirs}",
            hint="train the head on a cache of the same detector",
        )
    if artifact.info.category_ids != cache.categories.category_id.tolist():
        raise InputError(f"head {path} and cache {cache.path} have different categories")
