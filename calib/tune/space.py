"""What is searched: the settings of a method that vary and their ranges, from its class or a file of the user's.

A method's class names them in ``space``, one TOML table as a dict; a dimension is ``{"log": [low, high]}``, ``{"range":
[low, high]}`` or ``{"choice": [...]}``, and ``set`` holds fixed settings. ``space_on_base`` takes its place where the
method is built on a fitted head. A method without a space is tried once, with its defaults. The number of steps, a
cosine schedule and a short warm-up are set by the search. Rates reach from those of the papers (LVIS, 1,024 features
after a ReLU) to those of small feature caches; sampling thresholds are choices, so that trials of the same batches can
share one reading of the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

from calib import registry
from calib.errors import CalibError, FormatError
from calib.settings import has_key, known_keys, load_toml, with_overrides

KINDS = ("log", "range", "choice")


class Suggests(Protocol):
    """What draws values: an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Dimension:
    """One setting: ``kind`` of KINDS with its bounds or choices."""

    key: str
    kind: str
    values: tuple[Any, ...]

    def suggest(self, trial: Suggests, name: str) -> Any:
        """Draw a value under ``name``."""
        if self.kind == "choice":
            return trial.suggest_categorical(name, self.values)
        return trial.suggest_float(name, *self.values, log=self.kind == "log")

    @property
    def centre(self) -> Any:
        """Where a search begins: the middle, or the first choice."""
        if self.kind == "choice":
            return self.values[0]
        low, high = self.values
        return sqrt(low * high) if self.kind == "log" else (low + high) / 2


@dataclass(frozen=True)
class Space:
    """The search space of one method."""

    method: str
    fixed: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]

    @property
    def learns(self) -> bool:
        """Whether the method is trained in steps as it is searched."""
        settings = with_overrides(registry.load(registry.method(self.method).target)(), dict(self.fixed))
        return has_key(settings, "loop.steps") and getattr(settings, "when", "loss") == "loss"

    def suggest(self, trial: Suggests) -> dict[str, Any]:
        """Settings drawn by ``trial``; its parameters are named METHOD.KEY."""
        return dict(self.fixed) | {d.key: d.suggest(trial, f"{self.method}.{d.key}") for d in self.dimensions}

    @property
    def centre(self) -> dict[str, Any]:
        """Settings to begin with."""
        return dict(self.fixed) | {d.key: d.centre for d in self.dimensions}

    def start(self) -> dict[str, Any]:
        """The centre, as parameters of a trial."""
        return {f"{self.method}.{d.key}": d.centre for d in self.dimensions}


def with_steps(method: str, settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """``settings`` with every loop of ``method`` ``steps`` long, a cosine schedule and a warm-up of a fiftieth."""
    loops = [
        k.removesuffix("steps")
        for k in known_keys(registry.load(registry.method(method).target)())
        if k.endswith("loop.steps")
    ]
    own: dict[str, Any] = {}
    for loop in loops:
        own |= {f"{loop}steps": steps, f"{loop}schedule": "cosine", f"{loop}warmup_steps": steps // 50}
    return own | dict(settings)


def read_spaces(path: Path | None = None, *, on_base: bool = False) -> dict[str, Space]:
    """The space of every method, those in the TOML file ``path`` in their place; ``on_base``: for methods that are
    built on a fitted head.

    Raises:
        MissingFileError: no such file. FormatError: an unknown method or setting, or no such kind of range.
    """
    own = {} if path is None else load_toml(path)
    return {name: _space(name, table, path) for name, table in own.items()} | {
        name: _space(name, _table(name, on_base), None) for name in registry.METHODS if name not in own
    }


def _table(method: str, on_base: bool) -> Any:
    settings = registry.load(registry.method(method).target)
    table = getattr(settings, "space", {})
    return getattr(settings, "space_on_base", table) if on_base else table


def _space(name: str, table: Any, path: Path | None) -> Space:
    where = f"search space [{name}]{f' of {path}' if path else ''}"
    try:
        fixed = dict(table.get("set", {}))
        settings = with_overrides(registry.load(registry.method(name).target)(), fixed)
        dimensions = tuple(_dimension(key, entry, where) for key, entry in table.items() if key != "set")
        for d in dimensions:
            for value in d.values:
                with_overrides(settings, {d.key: value})
    except CalibError as e:
        raise FormatError(str(e) if str(e).startswith(where) else f"{where}: {e}", hint=e.hint) from None
    return Space(name, fixed, dimensions)


def _dimension(key: str, entry: Any, where: str) -> Dimension:
    if not isinstance(entry, dict) or len(entry) != 1 or (kind := next(iter(entry))) not in KINDS:
        raise FormatError(
            f"{where}: {key} is {entry}", hint="expected {log = [1e-5, 1e-2]}, {range = …} or {choice = …}"
        )
    values = tuple(entry[kind]) if isinstance(entry[kind], list) else ()
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    low = 0 if kind == "log" else float("-inf")
    if kind == "choice" and not values:
        raise FormatError(f"{where}: {key} has no choice")
    if kind != "choice" and not (is_number and len(values) == 2 and low < values[0] < values[1]):
        raise FormatError(f"{where}: {key} is {entry[kind]}: expected [low, high] with low < high, log above 0")
    return Dimension(key, kind, values)
