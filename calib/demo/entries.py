"""Which heads the demo compares, and with which settings: ``heads.toml``."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from calib.registry import load, method
from calib.settings import known_keys, with_overrides

CONTROL = "natural-converged"


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with its settings. ``note`` says in a few words what it is; ``base`` names the
    entry whose head it is built on, the detector's own classifier if empty."""

    name: str
    method: str
    note: str
    settings: dict[str, Any]
    base: str = ""

    @property
    def steps(self) -> int:
        """Training steps, over all stages; 0 where nothing is trained."""
        full = with_overrides(load(method(self.method).target)(), self.settings)
        keys = [k for k in known_keys(full) if k.endswith(".steps")]
        # DisAlign trains its base only where that is not the detector's own classifier.
        if getattr(full, "base", None) == "detector":
            keys.remove("base_loop.steps")
        return sum(known_keys(full)[k] for k in keys)

    def scaled(self, factor: float) -> "Entry":
        """The same head trained for ``factor`` of its steps."""
        full = with_overrides(load(method(self.method).target)(), self.settings)
        shorter = {k: max(1, round(v * factor)) for k, v in known_keys(full).items() if k.endswith(".steps")}
        return replace(self, settings={**self.settings, **shorter})


def entries(factor: float = 1.0, *, every_method: bool = False) -> Sequence[Entry]:
    """Heads in the order of the table, trained for ``factor`` of their steps; ``every_method``: the long table."""
    sources = ["heads.toml", "more_heads.toml"] if every_method else ["heads.toml"]
    tables = {k: v for s in sources for k, v in tomllib.loads(files(__package__).joinpath(s).read_text()).items()}
    all_ = [Entry(name, t["method"], t["note"], t.get("set", {}), t.get("base", "")) for name, t in tables.items()]
    return [e if factor == 1 else e.scaled(factor) for e in all_]


def is_random(entry: Entry, heads: Sequence[Entry]) -> bool:
    """Whether seeds differ: something is drawn in the training of ``entry``, or of its base among ``heads``."""
    return bool(entry.steps) or any(is_random(base, heads) for base in heads if base.name == entry.base)
