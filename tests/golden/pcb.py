"""pcb_*: the regularised losses in training, the iterative head, MS calibration."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calib.heads.affine import AffineHead
from calib.heads.iterative import IterativeHead
from calib.heads.iterative_map import IterativeMapHead
from calib.heads.linear import LinearClassifier
from calib.losses.confusion import (
    class_sums,
    pcb_seesaw_parts,
    pcb_sigmoid_target,
    pcb_softmax_parts,
    regularisation_strength,
    update_confusion,
)
from calib.losses.seesaw import add_counts, objectness_values
from calib.losses.sigmoid import one_hot
from calib.methods.eql_v2 import GradientBalance
from calib.methods.ms_calibration import MSCalibration

from .case import Case


def check(case: Case) -> None:
    """Each form is known by an array that only it has."""
    forms = {"s0r0_cnt_after": _cross_entropy, "s0r0_cum_samples_after": _seesaw, "s0r0_pos_grad_after": _eql_v2}
    forms |= {"feats": _iterative_map, "fc_w": _iterative, "M": _ms}
    found = [form for key, form in forms.items() if key in case]
    assert len(found) == 1, f"{case.name} has the form of none of: {', '.join(forms)}"
    found[0](case)


class _Running:
    """The matrix and the rule that switches the regulariser on."""

    def __init__(self, case: Case) -> None:
        self.case, self.h = case, case.hyper
        c = len(case["s0r0_cm_after"])
        self.matrix, self.counts = torch.zeros(c, c), torch.zeros(c)

    def observe(self, p: Tensor, y: Tensor, *, renormalise: bool) -> None:
        foreground = y < len(self.matrix)
        y = y[foreground]
        self.matrix = update_confusion(
            self.matrix, *class_sums(p[foreground], y), self.h["momentum"], renormalise=renormalise
        )
        self.counts = self.counts + torch.bincount(y, minlength=len(self.matrix))

    def strength(self, step: int, r: int, alpha: float) -> float:
        active = int(self.case[f"s{step}_epoch"]) >= self.h["start_epoch"] and bool((self.counts > 0).all())
        if f"s{step}r{r}_active" in self.case:
            self.case.check(f"s{step}r{r}_active", float(active))
        return regularisation_strength(alpha, r, self.h["n_iter"]) if active else 0.0

    def steps(self) -> list[tuple[int, int]]:
        n = sum(1 for _ in self.case.keys("s") if _.endswith("_epoch"))
        return [(s, r) for s in range(n) for r in range(self.h["n_iter"])]


def _cross_entropy(case: Case) -> None:
    run = _Running(case)
    for s, r in run.steps():
        z, y = case.leaf(f"s{s}r{r}_logits"), case[f"s{s}_labels"]
        run.observe(z[:, :-1].softmax(dim=1), y, renormalise=True)
        first, second = pcb_softmax_parts(z, y, run.matrix, run.strength(s, r, case.hyper["alpha"]))
        loss = first.sum() / case.hyper["avg_factor"] + second.sum() / len(y)
        loss.backward()
        case.check(f"s{s}r{r}_loss", loss)
        case.check(f"s{s}r{r}_grad_logits", z.grad)
        case.check(f"s{s}r{r}_cm_after", run.matrix)
        case.check(f"s{s}r{r}_cnt_after", run.counts)


def _seesaw(case: Case) -> None:
    run, h = _Running(case), case.hyper
    c = len(run.matrix)
    counts = torch.zeros(c + 1)
    for s, r in run.steps():
        z, y = case.leaf(f"s{s}r{r}_logits"), case[f"s{s}_labels"]
        counts = add_counts(counts, y)
        run.observe(z[:, :c].softmax(dim=1), y, renormalise=True)
        a = run.strength(s, r, h["alpha"])
        hard, soft = pcb_seesaw_parts(z[:, :c], y, counts[:c], run.matrix, a, h["p"], h["q"], h.get("eps", 0.01))
        hard, soft = hard.sum() / h["avg_factor"], soft.sum() / h["avg_factor"]
        pair = objectness_values(z[:, c:], y, c).sum() / h["avg_factor"]
        (hard + soft + pair).backward()
        case.check(f"s{s}r{r}_loss_total", hard + soft + pair)
        case.check(f"s{s}r{r}_loss_cls_objectness", pair)
        case.check(f"s{s}r{r}_loss_cls_classes", hard)
        if f"s{s}r{r}_loss_pcb_classes" in case:
            case.check(f"s{s}r{r}_loss_pcb_classes", soft)
        case.check(f"s{s}r{r}_grad_logits", z.grad)
        case.check(f"s{s}r{r}_cm_after", run.matrix)
        case.check(f"s{s}r{r}_cum_samples_after", counts)


def _eql_v2(case: Case) -> None:
    run, h = _Running(case), case.hyper
    c = len(run.matrix)
    # Their copy has no statistics before its first step and takes 1, which is what an infinite ratio gives.
    balance = GradientBalance(c, h["gamma"], h["mu"], h["alpha"], first_ratio=float("inf"))
    for s, r in run.steps():
        z, y = case.leaf(f"s{s}r{r}_logits"), case[f"s{s}_labels"]
        run.observe(z[:, :c].sigmoid(), y, renormalise=False)
        target = pcb_sigmoid_target(one_hot(y, c + 1), y, run.matrix, run.strength(s, r, h["alpha_pcb"]))
        loss = balance.values(z, target).mean()
        loss.backward()
        case.check(f"s{s}r{r}_loss", loss)
        case.check(f"s{s}r{r}_grad_logits", z.grad)
        case.check(f"s{s}r{r}_cm_after", run.matrix)
        case.check(f"s{s}r{r}_pos_grad_after", balance.positive)
        case.check(f"s{s}r{r}_neg_grad_after", balance.negative)


def _iterative(case: Case) -> None:
    h, classifier = case.hyper, LinearClassifier(case["fc_w"], case["fc_b"])
    form = {"mlp_layers": h.get("mlp_layers", 2), "layer_norm": _layer_norm(case)}
    head = IterativeHead(classifier, activation="softmax", iterations=h["n_iter"], hidden=h["mlp_hidden"], **form)
    _copy_mlp(case, "mlp_cls", head.mlp, head.norm)
    for r, z in enumerate(head.passes(case["X"])):
        case.check(f"r{r}_logits", z)


def _iterative_map(case: Case) -> None:
    feats, h = case["feats"], case.hyper
    channels, height, width = feats.shape[1:]
    sizes = {"channels": channels, "height": height, "width": width, "hidden": h["mlp_hidden_here"]}
    sizes |= {"fc1": len(case["fc1_b"]), "fc2": len(case["fc2_b"])}
    sizes |= {"outputs": len(case["fc_cls_b"]), "box_outputs": len(case["fc_reg_b"])}
    form = {"mlp_layers": h["mlp_layers"], "layer_norm": _layer_norm(case)}
    head = IterativeMapHead(sizes, activation="softmax", iterations=h["n_iter"], **form)
    layers = {"fc1": head.fc1, "fc2": head.fc2, "fc_cls": head.classifier, "fc_reg": head.regression}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(case[f"{name}_w"])
            layer.bias.copy_(case[f"{name}_b"])
    _copy_mlp(case, "mlp_cls", [*head.mlp_cls], head.norm_cls)
    _copy_mlp(case, "mlp_loc", [*head.mlp_loc], head.norm_loc)
    for r, (z, deltas) in enumerate(head.steps(feats.flatten(1))):
        case.check(f"r{r}_cls_score", z)
        case.check(f"r{r}_bbox_pred", deltas)
    case.check("final_scores", head.full_scores(feats.flatten(1)))


def _layer_norm(case: Case) -> str:
    """Their class puts it before the MLP of the logits."""
    if not case.hyper.get("use_layer_norm"):
        return "none"
    return "both" if "mlp_loc.layer_norm.weight" in case else "logits"


def _copy_mlp(case: Case, name: str, layers: Sequence[nn.Module], norm: nn.Module | None) -> None:
    """The names of their class MLP; a LayerNorm without arrays is as it was made, 1 and 0."""
    pairs = [(layer, f"{name}.layers.fc{i}") for i, layer in enumerate(layers, start=1)]
    if norm is not None and f"{name}.layer_norm.weight" in case:
        pairs.append((norm, f"{name}.layer_norm"))
    with torch.no_grad():
        for layer, key in pairs:
            for part, parameter in layer.named_parameters():
                parameter.copy_(case[f"{key}.{part}"])


def _ms(case: Case) -> None:
    """``scores`` are probabilities: their logarithms are logits of the same softmax."""
    matrix, scores, dead_below = case["M"], case["scores"], case.hyper["dead_threshold"]
    case.check("s_original", matrix.diagonal())
    case.check("s_modified", matrix.sum(dim=0))
    logits = scores.log().float()
    # The original form divides whatever it finds; leaving dead classes out is modification 2.
    for by, below, key in (("diagonal", 0.0, "cal_original_raw"), ("column", dead_below, "cal_modified_raw")):
        head = AffineHead(LinearClassifier(torch.zeros(scores.shape[1], 2)))
        MSCalibration(by, below, renormalise=False).apply(head, matrix)
        case.check(key, head.correct(logits)[:, :-1])
    case.check("dead", (matrix.sum(dim=0) < dead_below).double())
    head = AffineHead(LinearClassifier(torch.zeros(scores.shape[1], 2)), renormalise="foreground")
    MSCalibration("column", dead_below).apply(head, matrix)
    case.check("cal_modified_keep_fg_mass", head.correct(logits))
