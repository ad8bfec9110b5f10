"""Who writes a place of an object store: a lease, taken by a conditional PUT, that refuses a second writer.

``PARENT/.NAME.writing/lease-000001.json`` exists while ``PARENT/NAME`` is written. Its holder rewrites it now and then;
a lease that does not change for ``lease_s`` seconds belongs to a dead one, and is taken over by creating the next
number, which of several only one can. No clock of any machine is compared with another's. Before anything is
committed the holder looks whether the lease is still its own.
"""

import json
import os
import socket
import threading
import time
import uuid
from typing import Any, Self

from calib.errors import ExistsError, StorageError, UnsupportedError
from calib.layout import LEASE, WRITING
from calib.progress import Bar, Progress, silent
from calib.storage.environment import StorageSettings
from calib.storage.location import Remote
from calib.storage.transfer import create, exists, listing, read, remove, replace

BEATS = 4  # in the time after which a silent holder is taken for dead
LOOKS = 12  # in the same time, of who waits for a sign


class Lease:
    """The right to write ``place``, from ``take`` until ``release``."""

    def __init__(self, place: Remote, number: int, note: dict[str, Any], lease_s: float) -> None:
        self.place, self.folder, self._number, self._note = place, writing_folder(place), number, note
        self._lost = False
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, args=(lease_s / BEATS,), daemon=True)

    @classmethod
    def take(cls, place: Remote, *, patient: bool, progress: Progress = silent) -> Self:
        """Become the writer of ``place``. ``patient``: wait to see whether another one is alive, and take over if
        not.

        Raises:
            ExistsError: another process writes there. UnsupportedError: the store ignores If-None-Match. InputError,
                StorageError: as ``transfer.retrying``.
        """
        lease_s = StorageSettings.read().lease_s
        note = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex, "beat": 0}
        while True:
            number, holder = _newest(writing_folder(place))
            if holder is not None and not holder.get("released"):
                if not patient:
                    raise ExistsError(
                        f"{_who(holder)} is writing {place}",
                        hint=f"wait for it; of a dead process --resume takes over, after {lease_s:g} s without a sign",
                    )
                with progress(f"does {_who(holder)} live?", total=LOOKS, unit="looks") as bar:
                    _see_dead(place, number, holder, lease_s / LOOKS, bar)
            lease = cls(place, number + 1, note, lease_s)
            try:
                create(lease._object(number + 1), _json(note))
            except ExistsError:
                patient = False  # somebody was faster, and lives
                continue
            lease._check_store()
            lease._beating.start()
            return lease

    def _object(self, number: int) -> Remote:
        return self.folder / f"{LEASE}{number:06d}.json"

    def _check_store(self) -> None:
        try:
            create(self._object(self._number), _json(self._note | {"token": ""}))
        except ExistsError:
            return
        remove(self.folder)
        raise UnsupportedError(
            f"the store of {self.place} overwrites what If-None-Match protects: two writers could not be told apart",
            hint="use a store that honours it (Amazon S3, Google Cloud Storage, MinIO, Ceph of recent versions)",
        )

    def check(self) -> None:
        """Raise ExistsError unless the lease is still this process's."""
        if not self._lost:
            own = _read_note(self._object(self._number))
            self._lost = own is None or own["token"] != self._note["token"] or exists(self._object(self._number + 1))
        if self._lost:
            raise ExistsError(
                f"another process has taken over {self.place}: this one gave no sign of life for too long",
                hint="what was uploaded is kept; the other one goes on with it",
            )

    def _beat(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            try:
                self.check()
                self._note["beat"] += 1
                replace(self._object(self._number), _json(self._note))
            except StorageError:
                continue  # the server is away for everybody
            except Exception:
                return  # lost, or no longer allowed: the next commit finds out and says so

    def release(self, *, done: bool) -> None:
        """Give it back. ``done``: nothing is left to go on with, so that all traces of the writing go."""
        self._ended.set()
        if self._beating.is_alive():
            self._beating.join()
        if not self._lost:
            self.check()
            if done:
                remove(self.folder)
            else:
                replace(self._object(self._number), _json(self._note | {"released": True}))


def writing_folder(place: Remote) -> Remote:
    """Where the lease lies, and what else is kept until the writing is done."""
    return place.parent / WRITING.format(place.name)


def _newest(folder: Remote) -> tuple[int, dict[str, Any] | None]:
    numbers = [Remote(folder.protocol, f["name"]).name for f in listing(folder)]
    leases = sorted(n for n in numbers if n.startswith(LEASE))
    if not leases:
        return 0, None
    number = int(leases[-1].removeprefix(LEASE).removesuffix(".json"))
    return number, _read_note(folder / leases[-1])


def _see_dead(place: Remote, number: int, holder: dict[str, Any], every_s: float, bar: Bar) -> None:
    """Return when the lease was given back, or did not change however often one looked."""
    for _ in range(LOOKS):
        time.sleep(every_s)
        bar.advance()
        now = _read_note(writing_folder(place) / f"{LEASE}{number:06d}.json")
        if now is None or now.get("released"):
            return
        if now != holder:
            raise ExistsError(f"{_who(holder)} is writing {place}", hint="wait for it, or choose another --out")


def _read_note(place: Remote) -> dict[str, Any] | None:
    if not exists(place):
        return None
    note: dict[str, Any] = json.loads(read(place))
    return note


def _who(note: dict[str, Any]) -> str:
    return f"process {note.get('pid')} on {note.get('host')}"


def _json(note: dict[str, Any]) -> bytes:
    return json.dumps(note).encode()
