"""The methods and the head kinds, by name. Importing this module imports no torch.

Adding a method: one file in ``methods/`` and one entry here.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from calib.errors import UnknownNameError

# What a method does with a fitted head that it is given as its base: it transforms its logits or weights, it trains its
# weights on, or it has no use for it.
BASE_USES = ("transforms", "continues", "ignores")
LABELS = ("none", "any", "train")  # labels of proposals: none needed, those of either mode, those of training mode


@dataclass(frozen=True)
class MethodInfo:
    """One method. ``target`` is loaded when it is used. ``trains``: what is learned in steps, if anything.

    ``labels`` (of LABELS) and ``annotations``: what the cache must hold beside features. ``activations``: detectors
    that it is defined for (sigmoid: no background column; seesaw: an objectness pair in its place). ``base``: of
    BASE_USES.
    """

    name: str
    target: str
    paper: str
    summary: str
    trains: str = ""
    labels: str = "none"
    annotations: bool = False
    activations: tuple[str, ...] = ("softmax",)
    base: str = "ignores"

    @property
    def needs(self) -> tuple[str, ...]:
        """What the cache must hold, in words."""
        labels = {"none": (), "any": ("labels of either mode",), "train": ("labels",)}[self.labels]
        return ("features", *labels, *(("annotations",) if self.annotations else ()))


BOTH = ("softmax", "sigmoid")
ANY = (*BOTH, "seesaw")  # what learns a fresh layer asks nothing of the old one

_ENTRIES = (
    MethodInfo(
        "softmax",
        "calib.methods.softmax:Softmax",
        "Ren et al., Faster R-CNN, NeurIPS 2015",
        "The detector's own head, unchanged: the baseline of every table.",
        activations=ANY,
    ),
    MethodInfo(
        "natural",
        "calib.methods.natural:Natural",
        "the control of every comparison",
        "The detector's own head trained on with natural sampling: what longer training alone brings.",
        trains="weight, bias",
        labels="train",
        activations=ANY,
        base="continues",
    ),
    MethodInfo(
        "tau-norm",
        "calib.methods.tau_norm:TauNorm",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        "Divides every class's weight vector by its norm to the power tau.",
        activations=BOTH,
        base="transforms",
    ),
    MethodInfo(
        "simcal",
        "calib.methods.simcal:SimCal",
        "Wang et al., The Devil is in Classification, ECCV 2020",
        "Trains a second head on class-balanced proposals and uses it for the tail classes only.",
        trains="a second head",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "bags",
        "calib.methods.bags:Bags",
        "Li et al., Overcoming Classifier Imbalance with Balanced Group Softmax, CVPR 2020",
        "One softmax per group of classes of like frequency, gated by a foreground-background softmax.",
        trains="weight, bias",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "disalign",
        "calib.methods.disalign:DisAlign",
        "Zhang et al., Distribution Alignment, CVPR 2021",
        "Learns a per-class scale and shift of the logits, blended by a per-proposal confidence.",
        trains="2C + D + 1 numbers",
        labels="train",
        base="transforms",
    ),
    MethodInfo(
        "crt",
        "calib.methods.crt:CRT",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        "Re-initialises the classifier and trains it on class-balanced proposals.",
        trains="weight, bias",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "lws",
        "calib.methods.lws:LWS",
        "Kang et al., Decoupling Representation and Classifier, ICLR 2020",
        "Learns one factor per class on class-balanced proposals, weights frozen.",
        trains="C factors",
        labels="train",
        base="transforms",
    ),
    MethodInfo(
        "ncm",
        "calib.methods.ncm:NCM",
        "Kang et al., ICLR 2020; in detection: Li et al., CVPR 2020",
        "Scores by the nearest class mean; the detector decides on background.",
        labels="train",
        base="transforms",
    ),
    MethodInfo(
        "cosine",
        "calib.methods.cosine:Cosine",
        "Gidaris and Komodakis, Dynamic Few-Shot Visual Learning, CVPR 2018",
        "A cosine classifier with natural sampling: no norms that could follow counts.",
        trains="weight (, scale, bias)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "seesaw",
        "calib.methods.seesaw:Seesaw",
        "Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021",
        "Weighs a class's negatives by how much rarer they are and how wrongly they scored; objectness beside.",
        trains="weight, bias (C + 2 outputs)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "pcb",
        "calib.methods.pcb:PCB",
        "He et al., Relieving Long-tailed Instance Segmentation via Pairwise Class Balance, CVPR 2022",
        "Softens the targets by a running confusion matrix; an iterative head refines its own prediction.",
        trains="weight, bias, feedback MLP",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "ms-calibration",
        "calib.methods.ms_calibration:MSCalibration",
        "He et al., Pairwise Class Balance, CVPR 2022, supplement A",
        "Divides scores by how much of everything lands in a class, from a confusion matrix.",
        labels="any",
        base="transforms",
    ),
    MethodInfo(
        "norcal",
        "calib.methods.norcal:NorCal",
        "Pan et al., On Model Calibration for Long-Tailed Object Detection, NeurIPS 2021",
        "Divides the exponentials by image counts to the power gamma, background apart.",
        base="transforms",
    ),
    MethodInfo(
        "logit-adjustment",
        "calib.methods.logit_adjustment:LogitAdjustment",
        "Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021",
        "Subtracts tau log prior from the logits, after training or in the loss.",
        trains="weight, bias (when=loss)",
        activations=BOTH,
        base="transforms",
    ),
    MethodInfo(
        "logn",
        "calib.methods.logn:LogN",
        "Zhao et al., LogN: Logit Normalization for Long-Tailed Object Detection, IJCV 2024",
        "Normalises every class's logit by its mean and deviation over training proposals.",
        labels="any",
        base="transforms",
    ),
    MethodInfo(
        "fracal",
        "calib.methods.fracal:Fracal",
        "Alexandridis et al., Fractal Calibration for Long-Tailed Object Detection, CVPR 2025",
        "Shifts by image frequency and divides by the fractal dimension of a class's object centres.",
        annotations=True,
        activations=BOTH,
        base="transforms",
    ),
    MethodInfo(
        "balanced-softmax",
        "calib.methods.balanced_softmax:BalancedSoftmax",
        "Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020",
        "Trains with the class prior in the logits and scores without it.",
        trains="weight, bias",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "iif",
        "calib.methods.iif:IIF",
        "Alexandridis et al., Inverse Image Frequency for Long-Tailed Image Recognition, IEEE TIP 2023",
        "Multiplies the logits by the logarithm of inverse image frequency, after training or in the loss.",
        trains="weight, bias (when=loss)",
        base="transforms",
    ),
    MethodInfo(
        "reweight",
        "calib.methods.reweight:Reweight",
        "baselines of Li et al., CVPR 2020 and Wang et al., ECCV 2020; Cui et al., CVPR 2019",
        "Cross entropy weighted by inverse frequency, effective number or a power of the counts.",
        trains="weight, bias",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "focal",
        "calib.methods.focal:Focal",
        "Lin et al., Focal Loss for Dense Object Detection, ICCV 2017",
        "Lowers the loss of what is already right.",
        trains="weight, bias",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "class-margin",
        "calib.methods.class_margin:ClassMargin",
        "Cao et al., Label-Distribution-Aware Margin Loss, NeurIPS 2019",
        "Rare classes must win by a larger margin in training.",
        trains="weight, bias",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "eql",
        "calib.methods.eql:EQL",
        "Tan et al., Equalization Loss for Long-Tailed Object Recognition, CVPR 2020",
        "Foreground proposals put no negative pressure on tail classes.",
        trains="weight, bias (C sigmoids)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "eql-v2",
        "calib.methods.eql_v2:EQLv2",
        "Tan et al., Equalization Loss v2, CVPR 2021",
        "Balances the gradients that each class's positives and negatives have received.",
        trains="weight, bias (C + 1 sigmoids)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "loce",
        "calib.methods.loce:LOCE",
        "Feng et al., Exploring Classification Equilibrium in Long-Tailed Object Detection, ICCV 2021",
        "Margins from the running mean score of every class; a memory feeds the classes that score low.",
        trains="weight, bias",
        labels="train",
        base="continues",
    ),
    MethodInfo(
        "bacl",
        "calib.methods.bacl:BACL",
        "Qi et al., Balanced Classification: A Unified Framework for Long-Tailed Object Detection, arXiv 2308.02213",
        "Sigmoids with pairwise margins from a confusion matrix; features of confused classes are hallucinated.",
        trains="weight, bias (C + 1 sigmoids)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "gol",
        "calib.methods.gol:GOL",
        "Alexandridis et al., Long-tailed Instance Segmentation using Gumbel Optimized Loss, ECCV 2022",
        "Gumbel activations in place of sigmoids; negatives of tail classes are left out.",
        trains="weight, bias (C Gumbel activations)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "ecm",
        "calib.methods.ecm:ECM",
        "Cho and Krahenbuhl, Long-tail Detection with Effective Class-Margins, ECCV 2022",
        "Sigmoids with margins and weights from counts that bound average precision.",
        trains="weight, bias (C + 1 sigmoids)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "efl",
        "calib.methods.efl:EFL",
        "Li et al., Equalized Focal Loss for Dense Long-Tailed Object Detection, CVPR 2022",
        "A focal loss whose focusing grows with a class's imbalance of gradients.",
        trains="weight, bias (C sigmoids)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "tde",
        "calib.methods.tde:TDE",
        "Tang et al., Long-Tailed Classification by Keeping the Good and Removing the Bad Momentum, NeurIPS 2020",
        "Takes away what the features share with the momentum of training.",
        trains="weight (normalised, multi-head)",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "text",
        "calib.methods.text:Text",
        "Zhou et al., Detecting Twenty-thousand Classes using Image-level Supervision, ECCV 2022",
        "Projects features to vectors of the category names; categories without training rows score too.",
        trains="a projection",
        labels="train",
        activations=ANY,
    ),
    MethodInfo(
        "discriminant",
        "calib.methods.discriminant:Discriminant",
        "this project; Fisher, Annals of Eugenics 1936; Friedman, Regularized Discriminant Analysis, JASA 1989",
        "One Gaussian per class with a shared covariance, in closed form, pooled with a base's logits.",
        labels="train",
        activations=ANY,
        base="transforms",
    ),
    MethodInfo(
        "residual",
        "calib.methods.residual:Residual",
        "this project; He et al., Deep Residual Learning, CVPR 2016",
        "Trains the linear head on with a branch of two layers beside it, which starts at 0.",
        trains="weight, bias, a branch of two layers",
        labels="train",
        base="continues",
    ),
)

METHODS: dict[str, MethodInfo] = {m.name: m for m in _ENTRIES}

# What an artifact may name as its head; nothing outside this table is ever imported for a file.
HEADS: dict[str, str] = {
    "linear": "calib.heads.linear:LinearHead",
    "mlp": "calib.heads.mlp:MLPHead",
    "group": "calib.heads.group:GroupHead",
    "affine": "calib.heads.affine:AffineHead",
    "sigmoid": "calib.heads.sigmoid:SigmoidHead",
    "sigmoid-product": "calib.heads.sigmoid_product:SigmoidProductHead",
    "gumbel": "calib.heads.gumbel:GumbelHead",
    "objectness": "calib.heads.objectness:ObjectnessHead",
    "iterative": "calib.heads.iterative:IterativeHead",
    "ncm": "calib.heads.ncm:NCMHead",
    "tde": "calib.heads.tde:TDEHead",
    "aligned": "calib.heads.aligned:AlignedHead",
    "dual": "calib.heads.combine:DualHead",
    "average": "calib.heads.combine:AverageHead",
    "select": "calib.heads.combine:SelectHead",
    "per-class": "calib.heads.per_class:PerClassHead",
    "threshold": "calib.heads.per_class:ThresholdHead",
    "by-size": "calib.heads.by_size:BySizeHead",
    "calibrated": "calib.heads.calibrated:CalibratedHead",
    "discriminant": "calib.heads.discriminant:DiscriminantHead",
    "text": "calib.heads.text:TextHead",
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
