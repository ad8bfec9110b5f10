"""Folders and files of an object store as local ones: fetched to be read, uploaded when they are written."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from calib.errors import CalibError, ExistsError, InputError, MissingFileError
from calib.files import lock
from calib.layout import DESCRIPTION, HIDDEN_LOCK, MANIFEST, SHARDS, SUMMARY, TENSORS
from calib.progress import Progress, silent
from calib.storage.lease import Lease, writing_folder
from calib.storage.location import Remote, parse
from calib.storage.mirror import mirror
from calib.storage.transfer import create, exists, listing, retrying, upload

DEEPEST = 3  # MODELS/NAME/VERSION/head.json
LAST = (DESCRIPTION, SUMMARY, MANIFEST)  # whoever sees one of them sees the rest
MARKS = (DESCRIPTION, TENSORS, MANIFEST)  # what tells a folder's kind to those who write into it
_NAMES: dict[str, str] = {}  # local folder -> the URL it stands for, for messages

Files = dict[str, dict[str, Any]]  # relative name -> fsspec's description


def call(path: Path, remote: Remote) -> None:
    """Let messages call the local ``path`` by the URL that it stands for."""
    _NAMES[str(path)] = str(remote)


def as_named(text: str) -> str:
    """``text`` with local copies called by their URLs."""
    for path, url in _NAMES.items():
        text = text.replace(path, url)
    return text


def local(place: str | Path) -> Path:
    """A local path as it is; of a URL the local copy: a file, or a folder with the same names.

    Of a feature cache the files of shards are not among them: ``calib.cache`` fetches them when it needs them.

    Raises:
        MissingFileError: nothing there. InputError: a cache that is not complete, access refused, or no place.
        StorageError: the store does not answer. DiskFullError: it does not fit the mirror.
    """
    remote = parse(place)
    if isinstance(remote, Path):
        return remote
    found = _found(remote)
    version = sorted([name, *_version(entry)] for name, entry in found.items())
    path = mirror().entry(remote, version)
    for name, entry in found.items():
        mirror().fetch(path / name if name else path, Remote(remote.protocol, entry["name"]), entry["size"]).close()
    call(path, remote)
    return path


def _found(remote: Remote) -> Files:
    """Objects below ``remote``, without those of shards; the object itself under the name ''."""
    found = dict(_below(remote, "", DEEPEST))
    if not found and exists(remote):
        found = {"": retrying(lambda: remote.fs.info(remote.path), remote)}
    if "" in found or any(name.rpartition("/")[2] in LAST for name in found):
        return found
    if listing(writing_folder(remote)):
        raise InputError(
            f"{remote} is not complete: it is being written, or its writing stopped",
            hint="run the command that began it again (calib extract: with --resume)",
        )
    if not found:
        raise MissingFileError(f"{remote} is not there", hint="are bucket and key right?")
    return found


def _below(folder: Remote, prefix: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in listing(folder):
        name = entry["name"].rpartition("/")[2]
        if entry["type"] != "directory":
            yield prefix + name, entry
        elif depth > 0 and not name.startswith(".") and name != SHARDS:
            yield from _below(folder / name, f"{prefix}{name}/", depth - 1)


def _version(entry: dict[str, Any]) -> list[Any]:
    return [entry["size"], *(entry.get(k) for k in ("ETag", "etag", "md5Hash", "LastModified", "updated"))]


@contextmanager
def writing(place: str | Path, *, progress: Progress = silent) -> Iterator[Path]:
    """A local path to write to, as it is or, for a URL, one whose content is uploaded at the end.

    What stands there of heads is fetched first, so that the rules on overwriting are those of a local folder. Objects
    that are new are not written over those of another process. On an error nothing is uploaded; hidden files (pieces,
    checkpoints) stay on this machine, and the same command goes on from them.

    Raises:
        ExistsError: another process writes there. Others as ``local``.
    """
    remote = parse(place)
    if isinstance(remote, Path):
        yield remote
        return
    root = staging(remote)
    stage = root.joinpath(*remote.path.split("/")[-2:])
    call(stage, remote)
    with ExitStack() as stack:
        root.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(root / HIDDEN_LOCK, f"writing {remote}"))
        lease = Lease.take(remote, patient=True, progress=progress)
        done = False
        try:
            before = _fetch_marks(remote, stage)
            yield stage
            _upload(stage, remote, before, lease)
            done = True
        finally:
            lease.release(done=done)
        shutil.rmtree(stage.parent, ignore_errors=True)


def staging(remote: Remote) -> Path:
    """The local folder, always the same one, in which this machine writes what goes to ``remote``."""
    import xxhash

    return mirror().writing / xxhash.xxh3_64(remote.identity.encode()).hexdigest()


def _fetch_marks(remote: Remote, stage: Path) -> dict[str, tuple[int, int]]:
    """Lay a folder's marks into ``stage``, which holds nothing else but hidden files; their stamps by name."""
    if stage.is_dir():
        for path in stage.iterdir():
            if not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage.unlink(missing_ok=True) if stage.is_file() else None
    stage.parent.mkdir(parents=True, exist_ok=True)
    before = {}
    for name, entry in _below(remote, "", DEEPEST):
        target = stage / name
        if target.name in MARKS:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(retrying(lambda e=entry: remote.fs.cat_file(e["name"]), remote))  # type: ignore[misc]
            before[name] = _stamp(target)
    return before


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _upload(stage: Path, remote: Remote, before: dict[str, tuple[int, int]], lease: Lease) -> None:
    if stage.is_file():
        files = {"": stage}
    else:
        names = (p.relative_to(stage) for p in sorted(stage.rglob("*")) if p.is_file())
        files = {str(n): stage / n for n in names if not any(part.startswith(".") for part in n.parts)}
    changed = {name: path for name, path in files.items() if before.get(name) != _stamp(path)}
    try:
        for name in sorted(changed, key=lambda n: (n.rpartition("/")[2] in LAST, n)):
            lease.check()
            target = remote / name if name else remote
            if name.rpartition("/")[2] == DESCRIPTION and name not in before:
                create(target, changed[name].read_bytes())
            else:
                upload(changed[name], target)
    except ExistsError:
        raise
    except CalibError as e:
        raise type(e)(f"{e}; what was to be uploaded lies in {stage.parent}", hint=e.hint) from e
