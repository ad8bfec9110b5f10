"""What matches say about the report's heads: kinds of false detections, confusion, and what the cap cuts."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from calib.analysis import ask

from .runs import Runs

KINDS = ("duplicate", "poor_box", "wrong_class", "background", "other")
TAKEN_FOR = ("right", "same", "rarer", "frequent", "nothing")
PAIRS_PER_HEAD = 15
_EVERYTHING = str(10**12)


def false_kinds(runs: Runs) -> list[dict[str, Any]]:
    """Per head and bin: true detections, false ones, and false ones of each kind per true one."""
    return [_placed(runs, row) for row in _asked(runs, "false_positive_kinds")]


def cut(runs: Runs) -> list[dict[str, Any]]:
    """Per head and bin: true detections, and those beyond the cap."""
    return [_placed(runs, row) for row in _asked(runs, "cut_by_cap")]


def is_anything_beyond(runs: Runs) -> bool:
    """Whether a detections file held more than the cap keeps, without which no cut can be seen."""
    import pyarrow.parquet as pq

    if runs.cap < 0:
        return False
    return any(
        len(pq.read_table(path, columns=["rank"], filters=[("rank", ">", runs.cap)])) > 0
        for path in runs.matches.values()
    )


def _asked(runs: Runs, question: str) -> Iterator[dict[str, Any]]:
    cap = str(runs.cap) if runs.cap > 0 else _EVERYTHING
    variables = {"cap": cap, "bins": ",".join(map(str, runs.edges))}
    yield from ask([p.parent for p in runs.matches.values()], question, variables).records()


def _placed(runs: Runs, row: dict[str, Any]) -> dict[str, Any]:
    """A row of an answer with indices of head and bin; bins are counted from 1 in SQL."""
    rest = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in ("run", "bin")}
    return {"head": runs.names.index(row["run"]), "bin": None if row["bin"] is None else row["bin"] - 1, **rest}


def confusion(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """What the best-scored detection that covers an object (IoU >= 0.5) calls it.

    ``outcomes``: per head and bin of the object the numbers of objects called right, by a class of the same bin, by a
    rarer or more frequent one, and of those that nothing covers. ``pairs``: the commonest wrong names of objects of the
    rarest bin, with their number per head.
    """
    assert runs.bin_of is not None
    table = runs.categories
    bin_of = dict(zip(table["name"].to_pylist(), runs.bin_of.tolist(), strict=True))
    count = dict(zip(table["name"].to_pylist(), table["instance_count"].to_pylist(), strict=True))
    objects = np.bincount(runs.bin_of, table["n_gt"].to_numpy(), minlength=len(runs.edges) + 1)
    found = {name: [Counter[str]() for _ in objects] for name in runs.matches}
    wrong: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in runs.matches}
    rarest = min(bin_of.values())
    paths = [p.parent for p in runs.matches.values()]
    for row in ask(paths, "rare_confusion", {"below": _EVERYTHING, "limit": _EVERYTHING}).records():
        name, taken = row["category"], row["taken_for"]
        own, other = bin_of[name], bin_of[taken]
        kind = "right" if name == taken else "same" if own == other else "rarer" if other < own else "frequent"
        found[row["run"]][own][kind] += row["n"]
        if own == rarest and name != taken:
            wrong[row["run"]][name, taken] += row["n"]
    outcomes = []
    for run, bins in found.items():
        for b, counter in enumerate(bins):
            nothing = max(0, int(objects[b]) - counter.total())
            numbers = {key: counter[key] for key in TAKEN_FOR[:-1]} | {"nothing": nothing}
            if sum(numbers.values()):
                outcomes.append({"head": runs.names.index(run), "bin": b, **numbers})
    shown = {pair for counter in wrong.values() for pair, _ in counter.most_common(PAIRS_PER_HEAD)}
    pairs = [
        {
            "category": a,
            "count": count[a],
            "taken": b,
            "takenCount": count[b],
            "n": [wrong[run][a, b] if run in wrong else None for run in runs.names],
        }
        for a, b in sorted(shown)
    ]
    return {"outcomes": outcomes, "pairs": pairs}
