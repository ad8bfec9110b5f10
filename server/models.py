"""The model repository: ``MODELS/NAME/VERSION/`` folders, each a head artifact.

A name or version from a request is looked up in a table; it never becomes part of a path. What cannot be
loaded stays in the index with its reason while everything else is served. A reload builds the new versions
first and replaces the table in one assignment: requests under way keep the model they were given.

Of several workers the one whose turn it is reads the folder, for all of them (``shared``): the others load copies of
what it has read, whatever has become of the folder meanwhile.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from calib.artifact import HeadInfo, load
from calib.errors import CalibError, FormatError, SettingError, UnknownNameError
from calib.heads.base import Head
from calib.settings import Nms

from .compute import Compute
from .errors import BadRequestError, BusyError, NotServedError, text_of
from .folders import VERSION, check_files, scan, scan_some, stamp
from .formats.outputs import MAX_PER_IMAGE
from .shared import Change, Shared
from .statistics import Statistics

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
    """A version folder and what became of it: a model, or the reason why there is none.

    ``stamp`` is that of its files when they were read, ``copy`` names what other workers load.
    """

    model: Model | None
    reason: str = ""
    stamp: str = ""
    copy: str = ""


Versions = dict[int, Entry]
Changes = dict[tuple[str, int], Entry | None]  # by name and version; None takes it out of the index


class Repository:
    """All models below ``root``."""

    def __init__(
        self,
        root: Path,
        pinned: Mapping[str, int] | None = None,
        compute: Compute | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Load every version; ``pinned`` names the default version of a model where it is not the highest.

        ``compute`` brings heads into the form that computes. Where another worker has loaded before, which ``shared``
        tells, what it loaded is loaded, without a look at ``root``.

        Raises:
            MissingFileError: no such folder, or no model in it. InputError: not a folder. SettingError: a pinned
                version is not there. BusyError: there is no space for the copies.
        """
        self.root = root
        self._pinned = dict(pinned or {})
        self._compute = compute or Compute()
        self._lock = threading.Lock()  # one change of the table at a time; readers need none
        self._table: dict[str, Versions] = {}
        self._shared = shared
        with self._turn():
            if self._shared is not None and self._shared.begun:
                return
            found = scan_some(root)
            for name, version in self._pinned.items():
                if version not in found.get(name, {}):
                    raise SettingError(f"pinned: there is no version {version} of a model '{name}' in {root}")
            self._change({(n, v): self._read(n, v, path) for n in found for v, path in sorted(found[n].items())})

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
                could not be loaded; says why. BusyError: other workers cannot be reached; nothing has happened.
        """
        with self._turn():
            found = scan(self.root)
            if name not in found:
                kind = "model folder" if name in self._table else "model"  # it may be served, and its folder gone
                raise UnknownNameError(kind, name[:128], found)
            folders = found[name] if version is None else _only(found[name], name, version)
            read = {v: self._read(name, v, path) for v, path in sorted(folders.items())}
            gone = {(name, v): None for v in self._table.get(name, {}) if v not in found[name] and version is None}
            self._change({(name, v): entry for v, entry in read.items()} | gone)
        reasons = [f"version {v}: {e.reason}" for v, e in read.items() if e.reason]
        if reasons:
            raise BadRequestError(f"model '{name}' could not be loaded whole: {'; '.join(reasons)}")

    def unload(self, name: str, version: str | None = None) -> None:
        """Stop serving a version of a model, or all of them; requests under way are finished.

        Raises:
            UnknownNameError: no such model. NotServedError: no such version. BusyError: as ``load``.
        """
        with self._turn():
            versions = self._versions(name)
            chosen = versions if version is None else _only(versions, name, version)
            self._change({(name, v): Entry(None, "unloaded", e.stamp) for v, e in chosen.items()})

    def refresh(self) -> list[str]:
        """Load what is new or changed on disk since it was read, and unload what is gone.

        Returns names of models. What was unloaded on request stays so until its files change.
        """
        with self._turn():
            found, changes = scan(self.root), Changes()
            for name, versions in found.items():
                for version, path in versions.items():
                    entry = self._table.get(name, {}).get(version)
                    if entry is None or entry.stamp != stamp(path):
                        changes[name, version] = self._read(name, version, path)
            for name, entries in self._table.items():
                gone = [v for v, e in entries.items() if e.stamp and v not in found.get(name, {})]
                changes |= {(name, v): Entry(None, "its folder is gone") for v in gone}
            self._change(changes)
        return sorted({name for name, _ in changes})

    def is_behind(self) -> bool:
        """Whether another worker has changed something."""
        return self._shared is not None and self._shared.is_behind()

    def catch_up(self) -> None:
        """Follow what other workers have changed."""
        with self._lock:
            self._follow()

    def check_ready(self) -> None:
        """Raise BusyError while no model is loaded."""
        if not self.loaded():
            raise BusyError("no model is loaded", hint="POST /v2/repository/index tells why")

    def check_any(self) -> None:
        """Raise FormatError if nothing at all could be loaded, with the reasons."""
        if not self.loaded():
            reasons = [f"{row['name']}/{row['version']}: {row['reason']}" for row in self.index()]
            raise FormatError(f"no model in {self.root} can be loaded: {'; '.join(reasons)}")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Up to date, and the only one that changes something; copies that are not used any more are removed."""
        with self._lock, nullcontext() if self._shared is None else self._shared.turn():
            self._follow()
            try:
                yield
            finally:
                if self._shared is not None:
                    self._shared.tidy({e.copy for versions in self._table.values() for e in versions.values()})

    def _follow(self) -> None:
        changes = Changes()
        while self._shared is not None and (change := self._shared.changes()):
            # While these are loaded their copies may be removed; who did that has announced what follows them.
            changes |= {key: value and self._as_changed(*key, value) for key, value in change.items()}
        self._put(changes)

    def _as_changed(self, name: str, version: int, change: Change) -> Entry:
        """What another worker has loaded."""
        before = self._table.get(name, {}).get(version)
        if self._shared is None or not change.copy:
            return Entry(None, change.reason, change.stamp)
        if before and before.copy == change.copy:
            return replace(before, reason=change.reason, stamp=change.stamp)
        try:
            model = _model(name, version, self._shared.root / change.copy, self._compute)
        except Exception as e:
            _log.error("model '%s' version %d cannot be loaded as another worker has: %s", name, version, e)
            return Entry(None, _reason(e), change.stamp, change.copy)
        return Entry(model, change.reason, change.stamp, change.copy)

    def _change(self, changes: Changes) -> None:
        if self._shared is not None and changes:
            self._shared.write({k: Change(e.copy, e.reason, e.stamp) if e else None for k, e in changes.items()})
        self._put(changes)

    def _put(self, changes: Changes) -> None:
        table = {name: dict(versions) for name, versions in self._table.items()}
        for (name, version), entry in changes.items():
            versions = table.setdefault(name, {})
            if entry is None:
                versions.pop(version, None)
            else:
                versions[version] = entry
        self._table = {name: versions for name, versions in table.items() if versions}

    def _versions(self, name: str) -> Versions:
        if name not in self._table:
            raise UnknownNameError("model", name[:128], self._table)
        return self._table[name]

    def _read(self, name: str, version: int, path: Path) -> Entry:
        read, source, copy = stamp(path), path, ""  # before reading: what changes meanwhile is noticed later
        try:
            check_files(path)
            if self._shared is not None:
                copy = self._shared.copy(path, f"{name}-{version}-")
                source = self._shared.root / copy
            return Entry(_model(name, version, source, self._compute), "", read, copy)
        except BusyError:
            raise
        except Exception as e:  # one bad folder must not stop the others; whatever it was stands in the index
            reason = _reason(e).replace(str(source), str(path))
            _log.warning("model '%s' version %d cannot be loaded: %s", name, version, reason)
            before = self._table.get(name, {}).get(version) or Entry(None)
            return replace(before, reason=reason, stamp=read)


def _reason(error: Exception) -> str:
    return text_of(error) if isinstance(error, CalibError) else f"{type(error).__name__}: {error}"


T = TypeVar("T")


def _only(versions: Mapping[int, T], name: str, version: str) -> dict[int, T]:
    number = int(version) if VERSION.fullmatch(version) else -1
    if number not in versions:
        known = ", ".join(map(str, sorted(versions)))
        raise NotServedError(f"model '{name}' has no version '{version[:32]}'", hint=f"known: {known}")
    return {number: versions[number]}


def _model(name: str, version: int, path: Path, compute: Compute) -> Model:
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
