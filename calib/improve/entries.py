"""The heads of a table: methods with fixed settings, read from a TOML file."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calib.errors import CalibError, FormatError, SettingError
from calib.files import require
from calib.registry import load, method
from calib.settings import known_keys, with_overrides

KEYS = {"method": str, "note": str, "set": dict, "base": str}


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with its settings. ``note`` says in a few words what it is; ``base`` names the
    entry whose head it is built on, the detector's own classifier if empty."""

    name: str
    method: str
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = ""

    @property
    def steps(self) -> int:
        """Training steps, over all stages; 0 where nothing is trained."""
        full = self.full()
        keys = [k for k in known_keys(full) if k.endswith(".steps")]
        # DisAlign trains its base only where that is not the detector's own classifier.
        if getattr(full, "base", None) == "detector":
            keys.remove("base_loop.steps")
        return sum(known_keys(full)[k] for k in keys)

    def scaled(self, factor: float) -> "Entry":
        """The same head trained for ``factor`` of its steps."""
        shorter = {k: max(1, round(v * factor)) for k, v in known_keys(self.full()).items() if k.endswith(".steps")}
        return replace(self, settings={**self.settings, **shorter})

    def full(self) -> Any:
        """The dataclass of the method with these settings."""
        return with_overrides(load(method(self.method).target)(), self.settings)


def read_entries(*paths: Path) -> list[Entry]:
    """Rows of TOML files, in their order: ``[NAME]`` with ``method``, and ``note``, ``set`` (settings as ``calib train
    --set`` has them) and ``base`` (the NAME of an earlier row) where wanted.

    Raises:
        MissingFileError, FormatError: no such file, or no TOML. SettingError: a row has other keys, no or an unknown
            method, unknown settings, or a base that does not stand before it.
    """
    found: dict[str, Entry] = {}
    for path in paths:
        for name, row in _rows(path).items():
            found[name] = _entry(path, name, row, found)
    return list(found.values())


def _rows(path: Path) -> dict[str, Any]:
    try:
        rows = tomllib.loads(require(path, "table of heads").read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise FormatError(f"{path} is not TOML: {e}") from None
    if not rows:
        raise FormatError(f"{path} names no heads", hint='a row is [NAME] and method = "crt"')
    return rows


def _entry(path: Path, name: str, row: Any, before: dict[str, Entry]) -> Entry:
    where = f"{path}, [{name}]"
    if wrong := _wrong(name, row):
        raise SettingError(
            f"{where}: {wrong}", hint='a row is [NAME] and method = "crt"; note, set and base may follow'
        )
    entry = Entry(name, row["method"], row.get("note", ""), row.get("set", {}), row.get("base", ""))
    if entry.base and entry.base not in before:
        raise SettingError(f"{where}: no row [{entry.base}] stands before it", hint="base names an earlier row")
    try:
        entry.full()
    except CalibError as e:
        raise SettingError(f"{where}: {e}", hint=e.hint) from None
    return entry


def _wrong(name: str, row: Any) -> str:
    """What is wrong with the form of a row; empty if nothing is."""
    if not isinstance(row, dict):
        return "is a value, no row"
    if unknown := [key for key in row if key not in KEYS]:
        return f"'{unknown[0]}' is no key of a row; the settings of a method stand in set"
    if others := [key for key, value in row.items() if not isinstance(value, KEYS[key])]:
        return f"{others[0]} is {row[others[0]]!r}: expected a {'table' if others[0] == 'set' else 'text'}"
    if "method" not in row:
        return "names no method"
    return "a name has no / in it" if "/" in name else ""


def is_random(entry: Entry, heads: Sequence[Entry]) -> bool:
    """Whether seeds differ: something is drawn in the training of ``entry``, or of its base among ``heads``."""
    return bool(entry.steps) or any(is_random(base, heads) for base in heads if base.name == entry.base)
