"""The methods and the head kinds, by name. Importing this module imports no torch.

Adding a method: one file in ``heads/`` and one ``MethodInfo`` line here.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from calib.errors import UnknownNameError


@dataclass(frozen=True)
class MethodInfo:
    """One method. ``target`` is loaded when it is used; ``needs`` names what the cache must hold."""

    name: str
    target: str
    paper: str
    needs: tuple[str, ...]
    trains: str
    summary: str


_ENTRIES = (
    MethodInfo(
        "softmax",
        "calib.heads.softmax:Softmax",
        "Ren et al., Faster R-CNN, NeurIPS 2015",
        ("features",),
        "nothing",
        "The detector's own head, unchanged: the baseline of every table.",
    ),
    MethodInfo(
        "natural",
        "calib.heads.natural:Natural",
        "the control of every comparison",
        ("features", "labels"),
        "weight, bias",
        "The detector's linear head trained on with natural sampling: what longer training alone brings.",
    ),
    MethodInfo(
        "tau-norm",
        "calib.heads.tau_norm:TauNorm",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        ("features",),
        "nothing",
        "Divides every class's weight vector by its norm to the power tau.",
    ),
    MethodInfo(
        "simcal",
        "calib.heads.simcal:SimCal",
        "Wang et al., The Devil is in Classification, ECCV 2020",
        ("features", "labels"),
        "a second head",
        "Trains a second head on class-balanced proposals and uses it for the tail classes only.",
    ),
    MethodInfo(
        "bags",
        "calib.heads.bags:Bags",
        "Li et al., Overcoming Classifier Imbalance with Balanced Group Softmax, CVPR 2020",
        ("features", "labels"),
        "weight, bias",
        "One softmax per group of classes of like frequency, gated by a foreground-background softmax.",
    ),
    MethodInfo(
        "disalign",
        "calib.heads.disalign:DisAlign",
        "Zhang et al., Distribution Alignment, CVPR 2021",
        ("features", "labels"),
        "2C + D + 1 numbers",
        "Learns a per-class scale and shift of the logits, blended by a per-proposal confidence.",
    ),
    MethodInfo(
        "crt",
        "calib.heads.crt:CRT",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        ("features", "labels"),
        "weight, bias",
        "Re-initialises the classifier and trains it on class-balanced proposals.",
    ),
)

METHODS: dict[str, MethodInfo] = {m.name: m for m in _ENTRIES}

# What an artifact may name as its head; nothing outside this table is ever imported for a file.
HEADS: dict[str, str] = {
    "linear": "calib.heads.linear:LinearHead",
    "mlp": "calib.heads.mlp:MLPHead",
    "group": "calib.heads.bags:GroupHead",
    "aligned": "calib.heads.disalign:AlignedHead",
    "dual": "calib.heads.combine:DualHead",
    "average": "calib.heads.combine:AverageHead",
    "tau-select": "calib.heads.tau_norm:TauSelectHead",
}


def method(name: str) -> MethodInfo:
    """Look a method up.

    Raises:
        UnknownNameError: no such method; the nearest is named.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS, hint="calib methods lists them")
    return METHODS[name]


def load(target: str) -> Any:
    """Import ``"module:Class"``."""
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)
