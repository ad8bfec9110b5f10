"""What matches say about the report's heads: kinds of false detections, confusion, and what the cap cuts."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from calib.analysis import ask

from .runs import Runs

KINDS = ("duplicate", "poor_box", "wrong_class", "background", "other")
TAKEN_FOR = ("right", "same", "rarer", "frequent", "nothing")
PAIRS_PER_HEAD = 15
_EVERYTHING = str(10**12)


def false_kinds(runs: Runs) -> list[dict[str, Any]]:
    """Per head and bin of the class that is named, among the detections that the cap keeps: ``n_true``, ``n_false`` and
    the number of false ones of each kind."""
    assert runs.bin_of is not None
    ids = runs.categories["category_id"].to_numpy()
    rows = []
    for name, path in runs.matches.items():
        kept = [("rank", "<=", runs.cap_per_image)] if runs.cap_per_image > 0 else None
        table = pq.read_table(path, columns=["category_id", "kind", "rank"], filters=kept)
        bin_ = runs.bin_of[np.searchsorted(ids, table["category_id"].to_numpy())]
        kind = table["kind"].to_numpy(zero_copy_only=False)
        for b in range(len(runs.edges) + 1):
            counts = Counter(kind[bin_ == b].tolist())
            false = {k: counts[k] for k in KINDS}
            rows.append({"head": runs.names.index(name), "bin": b, "n_true": counts["true"]} | false)
            rows[-1]["n_false"] = sum(false.values())
    return rows


def cut(runs: Runs) -> list[dict[str, Any]]:
    """Per head and bin: true detections, and those beyond the cap."""
    variables = {"cap": str(runs.cap_per_image), "bins": ",".join(map(str, runs.edges))}
    rows = ask([p.parent for p in runs.matches.values()], "cut_by_cap", variables).records()
    names = ("n_true", "n_cut", "share_cut", "median_rank")
    # Bins are counted from 1 in SQL.
    return [
        {"head": runs.names.index(row["run"]), "bin": row["bin"] - 1, **{key: row[key] for key in names}}
        for row in rows
    ]


def is_anything_beyond(runs: Runs) -> bool:
    """Whether a detections file held more than the cap keeps, without which no cut can be seen."""
    if runs.cap_per_image < 0:
        return False
    return any(
        len(pq.read_table(path, columns=["rank"], filters=[("rank", ">", runs.cap_per_image)])) > 0
        for path in runs.matches.values()
    )


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
