"""Steps that are done once: what each depended on is recorded, and with the same inputs it is not done again.

A step that was begun with the same inputs goes on with what it had written; with other inputs its outputs are removed
first. What a step returns is recorded too (JSON), and stands for its outputs in the inputs of later steps: a step that
is done again with the same outcome causes no other.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import xxhash

from calib.errors import ExistsError
from calib.files import read_json, write_json
from calib.layout import LOCK, RunFolder

Note = Callable[[str], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """``do`` writes ``outputs`` and returns what there is to say of them; both follow from ``inputs`` alone.

    ``budget``: inputs that change how far it goes. With others the step goes on with what is there.
    """

    name: str
    inputs: Mapping[str, Any]
    outputs: tuple[Path, ...]
    do: Callable[[], Record]
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Steps:
    """Those of the run at ``out``, ``total`` in number; ``note`` is called with a line for each."""

    out: Path
    total: int
    note: Note
    number: int = 0
    done: list[str] = field(default_factory=list)  # that were not skipped
    seconds: dict[str, float] = field(default_factory=dict)  # of every step, when it was done

    def run(self, step: Step) -> Record:
        """Do it, go on with it, or read what it gave."""
        self.number += 1
        path = RunFolder(self.out).steps / f"{step.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = {"inputs": digest(step.inputs), "budget": digest(step.budget)}
        known: Record = read_json(path, "record of a step") if path.exists() else {}
        is_same = known.get("inputs") == wanted["inputs"]
        is_lost = self._is_lost(known.get("files", {}))
        is_there = all(path.exists() for path in step.outputs) and not is_lost
        if is_same and known.get("done") and known["budget"] == wanted["budget"] and is_there:
            self.seconds[step.name] = known["seconds"]
            self._say(step.name, f"done before, in {known['seconds']:.1f} s")
            result: Record = known["result"]
            return result
        if known.get("done") and not is_same:
            self._say(step.name, "its inputs are others than before: done again")
        if is_same and is_lost:
            self._say(step.name, "files that it had written are gone or cut: done again")
        if not is_same or is_lost:
            write_json(path, {"inputs": "", "done": False})  # what a kill leaves from here on is nobody's
            remove(step.outputs)
        write_json(path, wanted | {"done": False})
        return self._do(step, path, wanted)

    def _do(self, step: Step, path: Path, wanted: Record) -> Record:
        self._say(step.name, "...")
        begin = monotonic()
        result: Record = json.loads(json.dumps(step.do()))  # as it is read again
        seconds = round(monotonic() - begin, 2)
        files = dict(self._files(step.outputs))
        write_json(path, wanted | {"done": True, "seconds": seconds, "result": result, "files": files})
        self.done.append(step.name)
        self.seconds[step.name] = seconds
        self._say(step.name, f"{seconds:.1f} s")
        return result

    def _files(self, outputs: tuple[Path, ...]) -> Iterator[tuple[str, int]]:
        """Every file of ``outputs`` by its path in the run, with its bytes."""
        for output in outputs:
            for path in sorted(p for p in (output, *output.rglob("*")) if p.is_file()):
                yield path.relative_to(self.out).as_posix(), path.stat().st_size

    def _is_lost(self, files: Mapping[str, int]) -> bool:
        """Whether any of ``files``, which a step had written, is gone or has another size."""
        paths = ((self.out / name, size) for name, size in files.items())
        return any(not path.is_file() or path.stat().st_size != size for path, size in paths)

    def _say(self, name: str, what: str) -> None:
        self.note(f"[{self.number}/{self.total}] {name}: {what}")


def check_place(out: Path) -> None:
    """Whether a run may be written to ``out``; nothing is written before.

    Raises:
        ExistsError: something else than a run is there.
    """
    if out.exists() and not out.is_dir():
        raise ExistsError(f"{out} is a file", hint="choose another --out")
    others = [p for p in out.iterdir() if p.name != LOCK] if out.exists() else []
    if others and not RunFolder(out).steps.is_dir():
        raise ExistsError(f"{out} exists and is no run of calib improve", hint="choose another --out")


def digest(value: Any) -> str:
    """Of plain data; paths count by their text."""
    return xxhash.xxh3_64(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def remove(outputs: tuple[Path, ...]) -> None:
    """Files and folders, those that are there."""
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
