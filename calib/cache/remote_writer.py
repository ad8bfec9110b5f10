"""Writing a cache to object storage: shards are made on this machine and uploaded one by one, the manifest last.

::

    PARENT/NAME/shards/00003/*.parquet           uploaded as soon as the shard is made; the key follows from its number
    PARENT/.NAME.writing/lease-000001.json       who writes (see ``storage/lease.py``)
    PARENT/.NAME.writing/request.json            the manifest without shards: what is asked for
    PARENT/.NAME.writing/00003.json              created once, when all files of the shard are there: it is committed
    PARENT/NAME/manifest.json                    created once, after everything else; then PARENT/.NAME.writing goes

What is there in the end is, byte for byte, what ``CacheWriter`` writes into a local folder. Any machine can go on with
a cache that was begun: it needs the small files only.
"""

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calib.cache.categories import Categories
from calib.cache.classifier import Classifier
from calib.cache.meta import images_of_meta, placed
from calib.cache.schema import IMAGES_SCHEMA, Manifest, Shard
from calib.cache.shard import Prepared
from calib.cache.write import TABLES, CacheWriter
from calib.errors import CalibError, ExistsError, FormatError
from calib.files import lock, write_json
from calib.layout import HIDDEN_LOCK, IMAGES, LEASE, MANIFEST, META, REQUEST, SHARDS
from calib.progress import Progress, silent
from calib.storage.folders import call, staging
from calib.storage.lease import Lease, writing_folder
from calib.storage.location import Remote
from calib.storage.transfer import create, download, exists, listing, read, upload

WAITING = 2  # shards that may wait for their upload while the next one is made


class RemoteWriter(CacheWriter):
    """A ``CacheWriter`` of a staging folder that uploads what it commits, and then forgets it."""

    _place: Remote
    _lease: Lease | None = None
    _staging: Any = None  # the lock of this machine

    @classmethod
    def create_at(
        cls, place: Remote, manifest: Manifest, categories: Categories, classifier: Classifier
    ) -> "RemoteWriter":
        """As ``CacheWriter.create``.

        Raises:
            ExistsError: a cache is there or was begun, or another process writes it. StorageError, InputError: the
                store does not do what is asked.
        """
        if exists(place / MANIFEST) or _markers(place):
            raise ExistsError(
                f"{place} holds a cache already", hint="choose another --out, or add --resume to go on with it"
            )
        return cls._begin(place, manifest, categories, classifier, lambda: Lease.take(place, patient=False))

    @classmethod
    def open_at(
        cls,
        place: Remote,
        manifest: Manifest,
        categories: Categories,
        classifier: Classifier,
        progress: Progress = silent,
    ) -> "RemoteWriter":
        """As ``CacheWriter.open``. The lease of a writer that died is taken over.

        Raises:
            InputError: it was begun with other settings. Others as ``create_at``.
        """
        take = partial(Lease.take, place, patient=True, progress=progress)
        return cls._begin(place, manifest, categories, classifier, take)

    @staticmethod
    def begun(place: Remote) -> Manifest | None:
        """The manifest of the cache at ``place``, complete or begun (then without shards); None without one."""
        for manifest in (place / MANIFEST, writing_folder(place) / REQUEST):
            if exists(manifest):
                return Manifest.parse(json.loads(read(manifest)))
        return None

    @classmethod
    def _begin(
        cls,
        place: Remote,
        manifest: Manifest,
        categories: Categories,
        classifier: Classifier,
        take: Callable[[], Lease],
    ) -> "RemoteWriter":
        stage = staging(place) / place.name
        stage.parent.mkdir(parents=True, exist_ok=True)
        call(stage, place)
        here = lock(stage.parent / HIDDEN_LOCK, f"writing the cache {place}")
        lease = None
        try:
            if not exists(place / MANIFEST):
                lease = take()
            shutil.rmtree(stage, ignore_errors=True)
            _lay_out(place, stage)
            writer = cls.open(stage, manifest, categories, classifier)
            assert isinstance(writer, RemoteWriter)
            writer._place, writer._lease, writer._staging = place, lease, here
            if lease is not None and not exists(writing_folder(place) / REQUEST):
                create(writing_folder(place) / REQUEST, _bytes(manifest.document()))
        except BaseException:
            if lease is not None:
                lease.release(done=False)
            here.close()
            raise
        writer._pool = ThreadPoolExecutor(1)
        writer._uploads = deque()
        return writer

    _pool: ThreadPoolExecutor
    _uploads: deque[Future[None]]

    def __exit__(self, kind: object = None, error: BaseException | None = None, trace: object = None) -> None:
        if self._staging is None:  # it never began
            super().__exit__(kind, error, trace)
            return
        self._pool.shutdown(cancel_futures=error is not None)
        try:
            if self._lease is not None:
                self._lease.release(done=False)
                self._lease = None
        except CalibError:
            if error is None:
                raise
        finally:
            self._staging.close()
            super().__exit__(kind, error, trace)

    def admit(self, shard: Prepared) -> None:
        """Make a shard that lies ready part of the cache: its upload begins, and errors of earlier ones are raised."""
        super().admit(shard)
        entry = next(s for s in self.manifest.shards if s.name == shard.name)
        self._uploads.append(self._pool.submit(self._upload, entry))
        while len(self._uploads) > WAITING or (self._uploads and self._uploads[0].done()):
            self._uploads.popleft().result()

    def _upload(self, shard: Shard) -> None:
        assert self._lease is not None
        folder = self.path / SHARDS / shard.name
        for name in shard.files:
            upload(folder / name, self._place / SHARDS / shard.name / name)
        self._lease.check()
        create(writing_folder(self._place) / f"{shard.name}.json", _bytes(asdict(shard)))
        shutil.rmtree(folder)

    def finish(self) -> None:
        """Upload the tables, then the manifest; the cache is complete."""
        while self._uploads:
            self._uploads.popleft().result()
        super().finish()
        assert self._lease is not None
        for name in TABLES:
            if (self.path / name).exists():
                upload(self.path / name, self._place / name)
        self._lease.check()
        create(self._place / MANIFEST, (self.path / MANIFEST).read_bytes())
        lease, self._lease = self._lease, None
        lease.release(done=True)
        shutil.rmtree(self.path)


def _markers(place: Remote) -> list[Remote]:
    """Notes of committed shards of a cache that was begun."""
    names = [Remote(place.protocol, f["name"]) for f in listing(writing_folder(place))]
    return [n for n in names if n.name != REQUEST and not n.name.startswith(LEASE)]


def _lay_out(place: Remote, stage: Path) -> None:
    """Put into ``stage`` what ``CacheWriter`` needs to know of the cache at ``place``: manifest and images."""
    if exists(place / MANIFEST):
        (stage / SHARDS).mkdir(parents=True)
        (stage / MANIFEST).write_bytes(read(place / MANIFEST))
        return
    markers = _markers(place)
    if not markers:
        request = writing_folder(place) / REQUEST
        if exists(request):  # nothing is lost: another one may be asked for
            request.fs.rm_file(request.path)
        return
    (stage / SHARDS).mkdir(parents=True)
    found = [Shard(**json.loads(read(m))) for m in markers]
    shards = sorted(found, key=lambda s: (len(s.name), s.name))
    data = json.loads(read(writing_folder(place) / REQUEST)) | {"shards": [asdict(s) for s in shards]}
    write_json(stage / MANIFEST, data)
    images = pa.concat_tables([IMAGES_SCHEMA.empty_table(), *(_images(place, s) for s in shards)])
    pq.write_table(images, stage / IMAGES, compression="zstd", write_page_checksum=True)


def _images(place: Remote, shard: Shard) -> pa.Table:
    what = shard.files[META]
    remote = place / SHARDS / shard.name / META
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        download(remote, file.fileno(), what["bytes"], what["xxh3"])
        os.fsync(file.fileno())
        images = images_of_meta(Path(file.name))
    if images is None:
        raise FormatError(f"{remote} does not name its images", hint="extract the cache again")
    return placed(images, shard.name)


def _bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
