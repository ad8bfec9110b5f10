"""The demo's pictures: AP per bin, weight norms, and which categories gain."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from calib.artifact import load
from calib.cache import Cache
from calib.files import replacing
from calib.improve.request import CONVERGED as CONTROL
from calib.improve.table import Table
from calib.layout import PER_CATEGORY, RunFolder

_BASELINE, _CONTROL, _HEAD = "#8a8f98", "#c46a1b", "#2b6cb0"
_PANELS = (("AP", "all"), ("AP1", "< 10"), ("AP2", "10 to 99"), ("AP3", "100 to 999"), ("AP4", "1,000 or more"))


def write_plots(out: Path, table: Table) -> list[Path]:
    """Write ``ap_per_bin.png``, ``weight_norms.png`` and ``gain_per_category.png`` into ``out``; return them."""
    figures = {
        "ap_per_bin.png": _ap_per_bin(table),
        "weight_norms.png": _weight_norms(out),
        "gain_per_category.png": _gain_per_category(out, table),
    }
    for name, figure in figures.items():
        with replacing(out / name) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    return [out / name for name in figures]


def _ap_per_bin(table: Table) -> Figure:
    """One panel per bin, one line per head: filled at the small cap, hollow at the large one."""
    heads = [r.head for r in table.of_cap(table.caps[0])]
    shown = [(column, title) for column, title in _PANELS if table.counts[column]]
    figure = Figure(figsize=(3 + 2 * len(shown), 0.36 * len(heads) + 1.8), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (column, title) in zip(panels, shown, strict=True):
        small, large = ([r.means[column] for r in table.of_cap(cap)] for cap in table.caps)
        colours = [_colour(h) for h in heads]
        y = np.arange(len(heads))
        axes.hlines(y, small, large, colors=colours, linewidth=1)
        axes.scatter(small, y, c=colours, s=36, zorder=3, label=f"{table.caps[0]} per image")
        axes.scatter(
            large, y, facecolors="white", edgecolors=colours, s=36, zorder=3, label=f"{table.caps[-1]} per image"
        )
        control = heads.index(CONTROL)
        axes.axvline(small[control], color=_CONTROL, linewidth=0.8, linestyle=":")
        axes.set_title(f"{title}\n({table.counts[column]} categories)", fontsize=10)
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(heads)), heads)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    figure.supxlabel("box AP (%) on val, by training instances of the category", fontsize=10)
    return figure


def _colour(head: str) -> str:
    return _CONTROL if head == CONTROL else _BASELINE if head in ("softmax", "natural") else _HEAD


def _weight_norms(out: Path) -> Figure:
    """Norm of every category's weights against its training instances: why rare classes lose."""
    cache = Cache(RunFolder(out).cache("train"))
    count = np.maximum(cache.categories.instance_count, 1)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    series = (("detector", cache.classifier.weight, _BASELINE), (CONTROL, _linear_weight(out, CONTROL), _CONTROL))
    for name, weight, colour in (*series, ("crt", _linear_weight(out, "crt"), _HEAD)):
        norm = np.linalg.norm(weight[:-1], axis=1)
        axes.scatter(count, norm / norm.mean(), s=14, color=colour, alpha=0.8, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("training instances of the category")
    axes.set_ylabel("norm of its weights / mean norm")
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend()
    return figure


def _linear_weight(out: Path, head: str) -> NDArray[np.float32]:
    tensors = load(RunFolder(out).head(head)).head.state_dict()
    return np.asarray(tensors["classifier.weight"].numpy())


def _gain_per_category(out: Path, table: Table) -> Figure:
    """AP of the best head minus the control's, per category, at the small cap."""
    best = max(table.of_cap(table.caps[0]), key=lambda r: r.means["AP"]).head
    cap = table.caps[0]
    count, ours = _per_category(RunFolder(out).results_at(cap) / best)
    _, control = _per_category(RunFolder(out).results_at(cap) / CONTROL)
    present = (ours >= 0) & (control >= 0)
    gain = 100 * (ours - control)[present]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#555555", linewidth=0.8)
    for edge in (10, 100, 1000):
        axes.axvline(edge, color="#bbbbbb", linewidth=0.8, linestyle=":")
    axes.scatter(count[present], gain, s=16, c=np.where(gain >= 0, _HEAD, _CONTROL), alpha=0.85)
    axes.set_xscale("log")
    axes.set_xlabel("training instances of the category")
    axes.set_ylabel(f"AP of {best} - AP of {CONTROL} (points)")
    up, down = int((gain > 0).sum()), int((gain < 0).sum())
    axes.set_title(f"{up} categories gain, {down} lose (at most {cap} detections per image)", fontsize=10)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def _per_category(results: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    table = pq.read_table(results / PER_CATEGORY)
    return np.maximum(table["instance_count"].to_numpy(), 1), table["AP"].to_numpy()
