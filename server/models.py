"""The model repository: ``MODELS/NAME/VERSION/`` folders, each a head artifact.

A name or version from a request is looked up in a table; it never becomes part of a path. What cannot be
loaded stays in the index with its reason while everything else is served. A reload builds the new versions
first and replaces the table in one assignment: requests under way keep the model they were given.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from calib.artifact import DESCRIPTION, TENSORS, HeadInfo, load
from calib.errors import CalibError, FormatError, InputError, MissingFileError, SettingError, UnknownNameError
from calib.heads.base import Head
from calib.settings import Nms

from .compute import Compute
from .errors import BadRequestError, BusyError, NotServedError, text_of
from .formats.outputs import MAX_PER_IMAGE
from .kept import REASON, Kept
from .statistics import Statistics

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
VERSION = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)

_log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Model:
    """One version of a head, ready to compute. ``nms`` and ``min_box_side`` are its detector's own."""

    name: str
    version: int
    head: Head
    info: HeadInfo
    statistics: Statistics = field(default_factory=Statistics)

    @cached_property
    def nms(self) -> Nms:
        """The detector's settings where the artifact names them, else the defaults."""
        named = {k: v for k, v in self.info.detector.items() if k in Nms.__dataclass_fields__}
        return Nms(**named)

    @cached_property
    def min_box_side(self) -> float:
        """Pixels; smaller boxes are no detections."""
        return float(self.info.detector.get("min_box_side", 0.0))


@dataclass(frozen=True)
class Entry:
    """A version folder and what became of it: a model, or the reason why there is none."""

    path: Path
    model: Model | None
    reason: str = ""


Versions = dict[int, Entry]


class Repository:
    """All models below ``root``."""

    def __init__(
        self,
        root: Path,
        pinned: Mapping[str, int] | None = None,
        compute: Compute | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Load every version; ``pinned`` names the default version of a model where it is not the highest.

        ``compute`` brings heads into the form that computes. ``kept`` is what other workers have loaded, where one has,
        and keeps what this one loads.

        Raises:
            MissingFileError: no such folder, or no model in it. InputError: not a folder. SettingError: a pinned
                version is not there.
        """
        self.root = root
        self._pinned = dict(pinned or {})
        self._compute = compute or Compute()
        self._lock = threading.Lock()  # one change of the table at a time; readers need none
        self._table: dict[str, Versions] = {}
        is_later = kept is not None and kept.begun
        found = _scan(kept.root if kept is not None and is_later else root)
        if not found:
            raise _no_model(root)
        self._seen = _stamps(found)  # before reading: what changes meanwhile is noticed later
        if kept is None or is_later:
            for name in found:
                self._table[name] = self._read(name, found[name], {})
        else:
            kept.begin()
            for name in found:
                with self.keeping(kept, "load", name):
                    self._table[name] = self._read(name, found[name], {})
            kept.complete()
        for name, version in self._pinned.items():
            if version not in self._table.get(name, {}):
                raise SettingError(f"pinned: there is no version {version} of a model '{name}' in {root}")

    def find(self, name: str, version: str | None = None) -> Model:
        """The model of a version; without one the pinned version, or the highest that is loaded.

        Raises:
            UnknownNameError: no such model. NotServedError: no such version, or it is not loaded.
        """
        versions = self._versions(name)
        if version is None and name in self._pinned:
            version = str(self._pinned[name])
        if version is None:
            loaded = [entry.model for _, entry in sorted(versions.items()) if entry.model]
            if not loaded:
                raise NotServedError(f"no version of model '{name}' is loaded", hint=versions[max(versions)].reason)
            return loaded[-1]
        entry = versions.get(int(version)) if VERSION.fullmatch(version) else None
        if entry is None:
            known = ", ".join(map(str, sorted(versions)))
            raise NotServedError(f"model '{name}' has no version '{version[:32]}'", hint=f"known: {known}")
        if entry.model is None:
            raise NotServedError(f"version {version} of model '{name}' is not loaded", hint=entry.reason)
        return entry.model

    def loaded(self, name: str | None = None) -> list[Model]:
        """All models that can be asked, or those of one name, versions ascending.

        Raises:
            UnknownNameError: no such model.
        """
        names = sorted(self._table) if name is None else [name]
        return [e.model for n in names for _, e in sorted(self._versions(n).items()) if e.model]

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """What the folder holds: name, version, state READY or UNAVAILABLE, and the reason of the latter."""
        rows = []
        for name, versions in sorted(self._table.items()):
            for version, entry in sorted(versions.items()):
                state = "READY" if entry.model else "UNAVAILABLE"
                if entry.model or not ready_only:
                    rows.append({"name": name, "version": str(version), "state": state, "reason": entry.reason})
        return rows

    def load(self, name: str, version: str | None = None) -> None:
        """Read a version of a model, or all of them, from disk again, new ones included, then swap.

        A version that was served goes on being served when its folder cannot be read any more.

        Raises:
            UnknownNameError: no such model on disk. NotServedError: no such version on disk. BadRequestError: a version
                could not be loaded; says why.
        """
        with self._lock:
            found = _scan(self.root)
            if name not in found:
                raise UnknownNameError("model", name[:128], found)
            before = self._table.get(name, {})
            folders = found[name] if version is None else _only(found[name], name, version)
            versions = self._read(name, folders, before)
            self._table = {**self._table, name: versions if version is None else {**before, **versions}}
        reasons = [f"version {v}: {e.reason}" for v, e in sorted(versions.items()) if e.reason]
        if reasons:
            raise BadRequestError(f"model '{name}' could not be loaded whole: {'; '.join(reasons)}")

    def unload(self, name: str, version: str | None = None) -> None:
        """Stop serving a version of a model, or all of them; requests under way are finished.

        Raises:
            UnknownNameError: no such model. NotServedError: no such version.
        """
        with self._lock:
            versions = self._versions(name)
            chosen = versions if version is None else _only(versions, name, version)
            gone = {v: Entry(e.path, None, "unloaded") for v, e in chosen.items()}
            self._table = {**self._table, name: {**versions, **gone}}

    @contextmanager
    def keeping(self, kept: Kept, action: str, name: str, version: str | None = None) -> Iterator[None]:
        """Let ``kept`` follow a ``load`` or ``unload`` that happens within, also where it fails.

        Raises:
            BusyError: there is no space; nothing has happened then.
        """
        found = _scan(self.root).get(name, {}) if action == "load" else {}
        folders = {v: path for v, path in found.items() if version in (None, str(v))}
        staged = {v: kept.stage(name, v, path) for v, path in folders.items()}
        try:
            yield
        finally:
            entries = self._table.get(name, {})
            for v, copy in staged.items():
                kept.settle(copy, name, v, entries[v].reason if v in entries else "it was never loaded")
            for v, entry in entries.items():
                if action == "unload" and entry.model is None:
                    kept.drop(name, v, entry.reason)

    def refresh(self) -> list[str]:
        """Load what is new or changed on disk since the last look, and unload what is gone.

        Returns names of models. What was unloaded on request stays so until its files change.
        """
        found = _scan(self.root)
        stamps = _stamps(found)
        changed = [(n, v) for n, versions in found.items() for v in versions if stamps[n, v] != self._seen.get((n, v))]
        gone = [(n, v) for n, versions in self._table.items() for v in versions if v not in found.get(n, {})]
        gone = [(n, v) for n, v in gone if self._table[n][v].model is not None]
        self._seen = stamps
        for name, version in changed:
            # What cannot be loaded stands in the index with its reason, and was logged; or it has vanished meanwhile.
            with suppress(BadRequestError, UnknownNameError, NotServedError):
                self.load(name, str(version))
        for name, version in gone:
            self.unload(name, str(version))
        return sorted({name for name, _ in [*changed, *gone]})

    def check_ready(self) -> None:
        """Raise BusyError while no model is loaded."""
        if not self.loaded():
            raise BusyError("no model is loaded", hint="POST /v2/repository/index tells why")

    def check_any(self) -> None:
        """Raise FormatError if nothing at all could be loaded, with the reasons."""
        if not self.loaded():
            reasons = [f"{row['name']}/{row['version']}: {row['reason']}" for row in self.index()]
            raise FormatError(f"no model in {self.root} can be loaded: {'; '.join(reasons)}")

    def _versions(self, name: str) -> Versions:
        if name not in self._table:
            raise UnknownNameError("model", name[:128], self._table)
        return self._table[name]

    def _read(self, name: str, folders: dict[int, Path], before: Versions) -> Versions:
        versions = {}
        for version, path in sorted(folders.items()):
            try:
                if (told := path / REASON).exists():
                    versions[version] = Entry(path, None, told.read_text())
                    continue
                versions[version] = Entry(path, _model(name, version, path, self._compute))
            except Exception as e:  # one bad folder must not stop the others; whatever it was stands in the index
                reason = text_of(e) if isinstance(e, CalibError) else f"{type(e).__name__}: {e}"
                _log.warning("model '%s' version %d cannot be loaded: %s", name, version, reason)
                versions[version] = Entry(path, before[version].model if version in before else None, reason)
        return versions


def _scan(root: Path) -> dict[str, dict[int, Path]]:
    if not root.exists():
        raise MissingFileError(f"model folder not found: {root}", hint="calib train writes MODELS/NAME/VERSION")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected MODELS/NAME/VERSION/{DESCRIPTION}")
    names = [p for p in sorted(root.iterdir()) if _is_name(p.name) and p.is_dir()]
    found = {p.name: _version_folders(p) for p in names}
    return {name: versions for name, versions in found.items() if versions}


def _is_name(name: str) -> bool:
    # "stats" is a word of the protocol: GET /v2/models/stats is about all models.
    return NAME.fullmatch(name) is not None and name != "stats"


def left_out(root: Path) -> list[str]:
    """Heads below ``root`` whose folders have names that are not served, with the reason."""
    found = []
    for description in sorted(root.glob(f"*/*/{DESCRIPTION}")):
        version = description.parent
        if not _is_name(version.parent.name):
            found.append(f"{version}: a model's name is 1 to 128 letters, digits, '.', '_' or '-', and not 'stats'")
        elif not VERSION.fullmatch(version.name):
            found.append(f"{version}: a version is a whole number without zeros in front")
    return found


def _version_folders(folder: Path) -> dict[int, Path]:
    try:
        return {int(p.name): p for p in folder.iterdir() if VERSION.fullmatch(p.name) and p.is_dir()}
    except FileNotFoundError:  # removed while we look
        return {}
    except OSError as e:
        _log.warning("folder %s cannot be read: %s", folder, e)
        return {}


T = TypeVar("T")


def _only(versions: Mapping[int, T], name: str, version: str) -> dict[int, T]:
    number = int(version) if VERSION.fullmatch(version) else -1
    if number not in versions:
        known = ", ".join(map(str, sorted(versions)))
        raise NotServedError(f"model '{name}' has no version '{version[:32]}'", hint=f"known: {known}")
    return {number: versions[number]}


def _stamps(found: dict[str, dict[int, Path]]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Size and modification time of the files of every version."""
    stamps = {}
    for name, versions in found.items():
        for version, path in versions.items():
            files = [path / part for part in (DESCRIPTION, TENSORS)]
            stamps[name, version] = tuple((s.st_size, s.st_mtime_ns) for s in map(_status, files) if s)
    return stamps


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _no_model(root: Path) -> MissingFileError:
    hint = f"calib train METHOD --cache CACHE --out {root / 'NAME' / '1'} writes one"
    if (root / DESCRIPTION).exists():
        hint = f"this is a version of one model: give the folder of all models, {root.absolute().parent.parent}"
    elif any((p / DESCRIPTION).exists() for p in _version_folders(root).values()):
        hint = f"this is one model: give the folder of all models, {root.absolute().parent}"
    return MissingFileError(f"no model in {root}: expected NAME/VERSION/{DESCRIPTION}", hint=hint)


def _model(name: str, version: int, path: Path, compute: Compute) -> Model:
    root = path.parent.parent
    for part in (path, path / DESCRIPTION, path / TENSORS):
        if not part.resolve().is_relative_to(root.resolve()):
            raise InputError(f"{part} is a symbolic link that leaves {root}", hint="copy the files")
        if part is not path and part.exists() and not part.is_file():
            raise FormatError(f"{part} is not a regular file")
    artifact = load(path)
    model = Model(name, version, compute.prepare(artifact.head), artifact.info)
    _try_out(model, path, compute.device)
    return model


def _try_out(model: Model, path: Path, device: torch.device) -> None:
    """Compute one row: what fails here would fail for every client, and the first request need not wait."""
    head, info = model.head, model.info
    if len(info.category_names) != head.num_classes:
        raise FormatError(f"head {path} has {head.num_classes} classes and {len(info.category_names)} names")
    if not all(type(i) is int and 0 <= i < 2**63 for i in info.category_ids):
        raise FormatError(f"head {path} has category ids that are no whole numbers", hint="train the head again")
    if not all(isinstance(name, str) for name in info.category_names):
        raise FormatError(f"head {path} has category names that are no text", hint="train the head again")
    _ = model.min_box_side
    if type(model.nms.max_detections) is not int or model.nms.max_detections > MAX_PER_IMAGE:
        raise FormatError(f"head {path} asks for {model.nms.max_detections} detections: at most {MAX_PER_IMAGE}")
    with torch.inference_mode():
        scores = head.scores(torch.zeros(1, head.feature_size, device=device))
    if scores.shape != (1, head.num_classes) or not bool(torch.isfinite(scores).all()):
        raise FormatError(f"head {path} does not compute finite scores", hint="train the head again")


def description(model: Model) -> dict[str, Any]:
    """What a client wants to know of a head beyond its shapes."""
    info, nms = model.info, model.nms
    stages = info.detector.get("stages", 1)  # a cascade's features (and logits) lie side by side
    return ({"stages": stages} if stages > 1 else {}) | {
        "method": info.method,
        "category_ids": info.category_ids,
        "category_names": info.category_names,
        "score_threshold": nms.score_threshold,
        "nms_iou": nms.nms_iou,
        "max_detections": nms.max_detections,
    }
