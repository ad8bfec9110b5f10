"""The methods and the head kinds, by name. Importing this module imports no torch.

Adding a method: one file in ``heads/`` and one ``MethodInfo`` line here.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from calib.errors import UnknownNameError


@dataclass(frozen=True)
class MethodInfo:
    """One method. ``target`` is loaded when it is used; ``needs`` names what the cache must hold, ``activations`` for
    which detectors it is defined (sigmoid: no background column; seesaw: an objectness pair in its place). ``divides``:
    its loss is that of one process where several train together (``heads.fit.Batch``). ``base``: what it does with a
    fitted head that it is given as its base: one of ``BASE_USES``."""

    name: str
    target: str
    paper: str
    needs: tuple[str, ...]
    trains: str
    summary: str
    activations: tuple[str, ...] = ("softmax",)
    divides: bool = False
    base: str = "ignores"

    @property
    def learns(self) -> bool:
        """Whether it is trained, at least with some settings."""
        return self.trains != "nothing"


# It transforms its logits or weights, it trains its weights on, or it has no use for them.
BASE_USES = ("transforms", "continues", "ignores")
BOTH = ("softmax", "sigmoid")
ANY = (*BOTH, "seesaw")  # what learns a fresh layer asks nothing of the old one

_ENTRIES = (
    MethodInfo(
        "softmax",
        "calib.heads.softmax:Softmax",
        "Ren et al., Faster R-CNN, NeurIPS 2015",
        ("features",),
        "nothing",
        "The detector's own head, unchanged: the baseline of every table.",
        ANY,
    ),
    MethodInfo(
        "natural",
        "calib.heads.natural:Natural",
        "the control of every comparison",
        ("features", "labels"),
        "weight, bias",
        "The detector's own head trained on with natural sampling: what longer training alone brings.",
        ANY,
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "tau-norm",
        "calib.heads.tau_norm:TauNorm",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        ("features",),
        "nothing",
        "Divides every class's weight vector by its norm to the power tau.",
        BOTH,
        base="transforms",
    ),
    MethodInfo(
        "simcal",
        "calib.heads.simcal:SimCal",
        "Wang et al., The Devil is in Classification, ECCV 2020",
        ("features", "labels"),
        "a second head",
        "Trains a second head on class-balanced proposals and uses it for the tail classes only.",
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "bags",
        "calib.heads.bags:Bags",
        "Li et al., Overcoming Classifier Imbalance with Balanced Group Softmax, CVPR 2020",
        ("features", "labels"),
        "weight, bias",
        "One softmax per group of classes of like frequency, gated by a foreground-background softmax.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "disalign",
        "calib.heads.disalign:DisAlign",
        "Zhang et al., Distribution Alignment, CVPR 2021",
        ("features", "labels"),
        "2C + D + 1 numbers",
        "Learns a per-class scale and shift of the logits, blended by a per-proposal confidence.",
        divides=True,
        base="transforms",
    ),
    MethodInfo(
        "crt",
        "calib.heads.crt:CRT",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        ("features", "labels"),
        "weight, bias",
        "Re-initialises the classifier and trains it on class-balanced proposals.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "lws",
        "calib.heads.lws:LWS",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        ("features", "labels"),
        "C factors",
        "Learns one factor per class on class-balanced proposals, weights frozen.",
        divides=True,
        base="transforms",
    ),
    MethodInfo(
        "ncm",
        "calib.heads.ncm:NCM",
        "Kang et al., ICLR 2020; in detection: Li et al., CVPR 2020",
        ("features", "labels"),
        "nothing",
        "Scores by the nearest class mean; the detector decides on background.",
        base="transforms",
    ),
    MethodInfo(
        "cosine",
        "calib.heads.cosine:Cosine",
        "Gidaris and Komodakis, Dynamic Few-Shot Visual Learning, CVPR 2018",
        ("features", "labels"),
        "weight (, scale, bias)",
        "A cosine classifier with natural sampling: no norms that could follow counts.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "seesaw",
        "calib.heads.seesaw:Seesaw",
        "Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021",
        ("features", "labels"),
        "weight, bias (C + 2 outputs)",
        "Weighs a class's negatives by how much rarer they are and how wrongly they scored; objectness beside.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "pcb",
        "calib.heads.pcb:PCB",
        "He et al., Relieving Long-tailed Instance Segmentation via Pairwise Class Balance, CVPR 2022",
        ("features", "labels"),
        "weight, bias, feedback MLP",
        "Softens the targets by a running confusion matrix; an iterative head refines its own prediction.",
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "ms-calibration",
        "calib.heads.ms_calibration:MSCalibration",
        "He et al., Pairwise Class Balance, CVPR 2022, supplement A",
        ("features", "labels of any mode"),
        "nothing",
        "Divides scores by how much of everything lands in a class, from a confusion matrix.",
        base="transforms",
    ),
    MethodInfo(
        "norcal",
        "calib.heads.norcal:NorCal",
        "Pan et al., On Model Calibration for Long-Tailed Object Detection, NeurIPS 2021",
        ("features",),
        "nothing",
        "Divides the exponentials by image counts to the power gamma, background apart.",
        base="transforms",
    ),
    MethodInfo(
        "logit-adjustment",
        "calib.heads.logit_adjustment:LogitAdjustment",
        "Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021",
        ("features", "labels with when=loss"),
        "nothing (when=loss: weight, bias)",
        "Subtracts tau log prior from the logits, after training or in the loss.",
        divides=True,
        base="transforms",
    ),
    MethodInfo(
        "logn",
        "calib.heads.logn:LogN",
        "Zhao et al., LogN: Logit Normalization for Long-Tailed Object Detection, IJCV 2024",
        ("features", "labels of any mode"),
        "nothing",
        "Normalises every class's logit by its mean and deviation over training proposals.",
        base="transforms",
    ),
    MethodInfo(
        "fracal",
        "calib.heads.fracal:Fracal",
        "Alexandridis et al., Fractal Calibration for Long-Tailed Object Detection, CVPR 2025",
        ("features", "annotations"),
        "nothing",
        "Shifts by image frequency and divides by the fractal dimension of a class's object centres.",
        BOTH,
        base="transforms",
    ),
    MethodInfo(
        "balanced-softmax",
        "calib.heads.balanced_softmax:BalancedSoftmax",
        "Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020",
        ("features", "labels"),
        "weight, bias",
        "Trains with the class prior in the logits and scores without it.",
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "reweight",
        "calib.heads.reweight:Reweight",
        "baselines of Li et al., CVPR 2020 and Wang et al., ECCV 2020; Cui et al., CVPR 2019",
        ("features", "labels"),
        "weight, bias",
        "Cross entropy weighted by inverse frequency, effective number or a power of the counts.",
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "focal",
        "calib.heads.focal:Focal",
        "Lin et al., Focal Loss for Dense Object Detection, ICCV 2017",
        ("features", "labels"),
        "weight, bias",
        "Lowers the loss of what is already right.",
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "class-margin",
        "calib.heads.class_margin:ClassMargin",
        "Cao et al., Label-Distribution-Aware Margin Loss, NeurIPS 2019",
        ("features", "labels"),
        "weight, bias",
        "Rare classes must win by a larger margin in training.",
        divides=True,
        base="continues",
    ),
    MethodInfo(
        "eql",
        "calib.heads.eql:EQL",
        "Tan et al., Equalization Loss for Long-Tailed Object Recognition, CVPR 2020",
        ("features", "labels"),
        "weight, bias (C sigmoids)",
        "Foreground proposals put no negative pressure on tail classes.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "eql-v2",
        "calib.heads.eql_v2:EQLv2",
        "Tan et al., Equalization Loss v2, CVPR 2021",
        ("features", "labels"),
        "weight, bias (C + 1 sigmoids)",
        "Balances the gradients that each class's positives and negatives have received.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "tde",
        "calib.heads.tde:TDE",
        "Tang et al., Long-Tailed Classification by Keeping the Good and Removing the Bad Momentum, NeurIPS 2020",
        ("features", "labels"),
        "weight (normalised, multi-head)",
        "Takes away what the features share with the momentum of training.",
        ANY,
        divides=True,
    ),
    MethodInfo(
        "discriminant",
        "calib.heads.discriminant:Discriminant",
        "this project; Fisher, Annals of Eugenics 1936; Friedman, Regularized Discriminant Analysis, JASA 1989",
        ("features", "labels"),
        "nothing",
        "One Gaussian per class with a shared covariance, in closed form, pooled with a base's logits.",
        ANY,
        base="transforms",
    ),
    MethodInfo(
        "residual",
        "calib.heads.residual:Residual",
        "this project; He et al., Deep Residual Learning, CVPR 2016",
        ("features", "labels"),
        "weight, bias, a branch of two layers",
        "Trains the linear head on with a branch of two layers beside it, which starts at 0.",
        divides=True,
        base="continues",
    ),
)

METHODS: dict[str, MethodInfo] = {m.name: m for m in _ENTRIES}

# What an artifact may name as its head; nothing outside this table is ever imported for a file.
HEADS: dict[str, str] = {
    "linear": "calib.heads.linear:LinearHead",
    "mlp": "calib.heads.mlp:MLPHead",
    "group": "calib.heads.bags:GroupHead",
    "affine": "calib.heads.affine:AffineHead",
    "sigmoid": "calib.heads.sigmoid:SigmoidHead",
    "sigmoid-product": "calib.heads.fracal:SigmoidProductHead",
    "objectness": "calib.heads.seesaw:ObjectnessHead",
    "iterative": "calib.heads.iterative:IterativeHead",
    "ncm": "calib.heads.ncm:NCMHead",
    "tde": "calib.heads.tde:TDEHead",
    "aligned": "calib.heads.disalign:AlignedHead",
    "dual": "calib.heads.combine:DualHead",
    "average": "calib.heads.combine:AverageHead",
    "select": "calib.heads.combine:SelectHead",
    "per-class": "calib.heads.per_class:PerClassHead",
    "threshold": "calib.heads.per_class:ThresholdHead",
    "calibrated": "calib.heads.calibrated:CalibratedHead",
    "discriminant": "calib.heads.discriminant:DiscriminantHead",
    "residual": "calib.heads.residual:ResidualHead",
    "box-head": "calib.heads.box_head:BoxHead",
    "iterative-map": "calib.heads.iterative_map:IterativeMapHead",
    "cascade": "calib.heads.cascade:CascadeHead",
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
