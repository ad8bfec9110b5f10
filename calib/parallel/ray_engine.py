"""Work on a Ray cluster: Ray Data maps an actor pool over items, each of which ends in files of its own.

What is finished is known by files, not by Ray: whoever calls passes on only what is missing. Results are small rows.
Ray starts workers again that died and gives their items to others, on other nodes where one is gone; so an item may be
done twice, and what does it must write under temporary names and rename.
"""

import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calib.errors import InputError, MissingExtraError, MissingFileError, ProcessError, SettingError

Item = TypeVar("Item")
Result = TypeVar("Result")
Open = Callable[[], Callable[[Item], Result]]
# Of a local instance: items and results are all it holds.
OBJECT_STORE_BYTES = 256 << 20
TRIES = 5  # of an item whose worker dies
STALLED_S = 7200  # without any result: where nodes went and none came

GO_ON = "what was finished is whole: run the same command again to go on (calib extract: with --resume)"


@dataclass(frozen=True)
class RayEngine:
    """``address``: of a cluster (``HOST:6379``, ``auto``), else $RAY_ADDRESS, else an instance on this machine.

    At most ``processes`` at a time (0: as many as find room); each takes ``cpus`` processors, or a part of one, and
    ``gpus`` (None: one where the cluster has any).
    """

    address: str | None = None
    processes: int = 0
    cpus: float = 1.0
    gpus: float | None = 0.0

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise SettingError(f"{self.processes} processes: expected 0 (as many as find room) or more")
        if not self.cpus > 0:
            raise SettingError(f"{self.cpus:g} CPUs per process: expected more than 0")

    def run(self, open_worker: Open[Item, Result], items: Sequence[Item], done: Callable[[Result], object]) -> None:
        """Do ``items``, and call ``done`` here with the result of each, in the order in which they end.

        Args:
            open_worker: called once per worker, which does one item after the other with what it returns. It and
                ``items`` are pickled; folders named relative to the working directory are those of this process.

        Raises:
            MissingExtraError: Ray is not installed. InputError: no cluster at the address. ProcessError: no node has
                room for a worker, or Ray gave up. Errors of ``open_worker`` and of items are raised as themselves.
        """
        if not items:
            return
        with _connected(self.address) as ray:
            asked = self._asked(ray)
            slots = _slots(ray, asked)
            most = min(self.processes or len(items), len(items))
            # One item at a time and worker: none waits behind a long one while another worker is idle.
            pool = ray.data.ActorPoolStrategy(
                min_size=1, max_size=most, initial_size=min(most, slots), max_tasks_in_flight_per_actor=1
            )
            tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tries).remote()
            rows = [{"number": k, "item": pickle.dumps(item)} for k, item in enumerate(items)]
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                fn_constructor_args=(open_worker, str(Path.cwd()), tries),
                batch_size=1,
                compute=pool,
                num_cpus=self.cpus,
                num_gpus=asked.get("GPU"),
            )
            results.context.enable_progress_bars = False
            results.context.execution_no_progress_timeout_s = STALLED_S
            try:
                for row in results.iter_rows():
                    error, result = pickle.loads(row["result"])
                    if error is not None:
                        raise error
                    done(result)
            except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as e:
                raise ProcessError(
                    f"Ray gave up: {str(e).strip().splitlines()[-1]}",
                    hint=GO_ON,
                ) from e

    def _asked(self, ray: Any) -> dict[str, float]:
        """Of the node that a worker runs on."""
        gpus = self.gpus if self.gpus is not None else min(1.0, ray.cluster_resources().get("GPU", 0.0))
        return {"CPU": self.cpus} | ({"GPU": gpus} if gpus else {})


def _slots(ray: Any, asked: dict[str, float]) -> int:
    """Workers that find room now.

    Raises:
        ProcessError: none does; a pool would wait for ever without a word.
    """
    free, nodes = ray.available_resources(), [n["Resources"] for n in ray.nodes() if n["Alive"]]
    slots = min(int(free.get(name, 0) / n) for name, n in asked.items())
    if slots and any(all(node.get(name, 0) >= n for name, n in asked.items()) for node in nodes):
        return slots
    held = "; ".join(_in_words({name: node.get(name, 0) for name in asked}) for node in nodes)
    raise ProcessError(
        f"no room for a worker ({_in_words(asked)}) on the Ray cluster: its nodes have {held}, and "
        f"{_in_words({name: free.get(name, 0) for name in asked})} are free",
        hint="wait for other jobs, add nodes, or ask for less with --cpus",
    )


def _in_words(resources: dict[str, float]) -> str:
    return ", ".join(f"{n:g} {name}" for name, n in resources.items())


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The package ``ray``, with a cluster; one that was started here ends here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The core warns on stderr, once per actor, of arguments that this process keeps for as long as it runs.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    ours = bool(address) or not ray.is_initialized()  # Ray refuses a second cluster in one process
    if ours:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            store = {"object_store_memory": OBJECT_STORE_BYTES}
            options |= {"num_cpus": _cores(), "include_dashboard": False} | store
        try:
            _check_reachable(address)
            ray.init(address, **options)
        except (OSError, RuntimeError, ValueError) as e:
            raise InputError(
                f"no Ray cluster at {address}: {str(e).strip().splitlines()[0]}", hint="ray start --head on one machine"
            ) from e
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself waits two minutes for a machine that is not there."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Tries:
    """Counts how often items are begun, as an actor. Ray's own limit does not serve: it counts every attempt to reach a
    worker that is being started again, and no limit means that an item which kills its worker goes round for ever."""

    def __init__(self) -> None:
        self._begun = Counter[int]()

    def begin(self, number: int) -> int:
        """How often ``number`` was begun, with this time."""
        self._begun[number] += 1
        return self._begun[number]


class _Worker:
    """Opens with the first item, so that errors of opening come back as those of an item."""

    def __init__(self, open_worker: Callable[[], Callable[[Any], Any]], folder: str, tries: Any) -> None:
        self._open, self._folder, self._tries = open_worker, folder, tries
        self._do: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [self._done(*row) for row in zip(batch["number"], batch["item"], strict=True)]}

    def _done(self, number: int, pickled: bytes) -> bytes:
        try:
            self._begin(int(number))
            item = pickle.loads(pickled)
            if self._do is None:
                self._do = self._opened()
            return pickle.dumps((None, self._do(item)))
        except Exception as e:
            with suppress(Exception):
                content = pickle.dumps((e, None))
                pickle.loads(content)
                return content
            return pickle.dumps((ProcessError(f"{type(e).__name__}: {e}"), None))

    def _begin(self, number: int) -> None:
        import ray

        if ray.get(self._tries.begin.remote(number)) > TRIES:
            raise ProcessError(f"{TRIES} workers died one after the other on the same item", hint=f"memory? {GO_ON}")

    def _opened(self) -> Callable[[Any], Any]:
        try:
            os.chdir(self._folder)
        except OSError as e:
            raise MissingFileError(
                f"a worker cannot enter the working directory {self._folder}: {e.strerror}",
                hint="all machines must see the same folders under the same names",
            ) from e
        return self._open()
