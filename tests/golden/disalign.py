"""disalign_*: the detection form (linear, cosine), the classification layer (eq. 6, no background), training."""

import torch
from torch import Tensor

from calib.heads.aligned import AlignedHead, align
from calib.heads.linear import LinearClassifier
from calib.losses.softmax import chunk_mean, cross_entropy
from calib.losses.weights import power_class_weights
from calib.settings import Loop
from calib.training.optimizer import Updater

from .case import Case


def check(case: Case) -> None:
    if "alpha_init" in case:
        _classification(case)
    elif "batch_index" in case:
        _trajectory(case)
    else:
        _detection(case)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    return chunk_mean(values, torch.zeros(len(values), dtype=torch.long), 1, weights)


def _classifier(case: Case) -> LinearClassifier:
    scale = case.optional("cos_scale")
    return LinearClassifier(case["W"], case["b"] if scale is None else None, scale)


def _head(case: Case, suffix: str = "") -> AlignedHead:
    head = AlignedHead(_classifier(case), "eq5", detector_logits=False)
    with torch.no_grad():
        if "alpha" + suffix in case:
            head.alpha.copy_(case["alpha" + suffix])
            head.beta.copy_(case["beta" + suffix])
        else:
            head.reset(torch.Generator())
        head.confidence.weight.copy_(case["conf_w" + suffix])
        head.confidence.bias.copy_(case["conf_b" + suffix])
    return head


def _detection(case: Case) -> None:
    head, y = _head(case), case["y"]
    weights = power_class_weights(case["counts"], case.hyper["rho"])
    case.check("class_weight", weights)
    case.check("raw_logits", head.classifier(case["X"]))
    z = head.aligned(case["X"])
    z.retain_grad()
    loss = _weighted(cross_entropy(z, y), weights[y])
    loss.backward()
    case.check("aligned_logits", z)
    case.check("probs", head.full_scores(case["X"]))
    case.check("loss", loss)
    case.check("d_logits", z.grad)
    case.check("d_alpha", head.alpha.grad)
    case.check("d_beta", head.beta.grad)
    case.check("d_conf_w", head.confidence.weight.grad)
    case.check("d_conf_b", head.confidence.bias.grad)


def _classification(case: Case) -> None:
    """No background column; the cosine layer's confidence sees the normalised feature."""
    raw = _classifier(case)(case["X"])
    x = torch.nn.functional.normalize(case["X"], eps=1e-12) if "cos_scale" in case else case["X"]
    if "cos_scale" in case:
        case.ignore("b")  # the layer has none
    at_init = torch.sigmoid(x @ case["conf_w_init"].T + case["conf_b_init"])
    case.check("logits_at_init", align(raw, at_init, case["alpha_init"][0], case["beta_init"][0], "eq6"))
    v = case.leaf("conf_w_init" if "conf_w" not in case else "conf_w")
    c = case.leaf("conf_b_init" if "conf_b" not in case else "conf_b")
    alpha, beta = case.leaf("alpha"), case.leaf("beta")
    z = align(raw, torch.sigmoid(x @ v.T + c), alpha[0], beta[0], "eq6")
    weights = power_class_weights(case["counts"], case.hyper["rho"])[:-1]
    loss = _weighted(cross_entropy(z, case["y"]), weights[case["y"]])
    loss.backward()
    case.check("class_weight", weights)
    case.check("logits", z)
    case.check("loss", loss)
    for name, leaf in (("d_alpha", alpha), ("d_beta", beta), ("d_conf_w", v), ("d_conf_b", c)):
        case.check(name, leaf.grad)


def _trajectory(case: Case) -> None:
    h, head = case.hyper, _head(case, "0")
    weights = power_class_weights(case["counts"], h["rho"])
    updater = Updater(head, Loop(momentum=h["momentum"], weight_decay=h["weight_decay"]))
    losses = []
    for step, (rows, lr) in enumerate(zip(case["batch_index"], case["lr"].tolist(), strict=True), start=1):
        y = case["y"][rows]
        loss = _weighted(cross_entropy(head.aligned(case["X"][rows]), y), weights[y])
        losses.append(float(loss.detach()))
        updater.update(loss, lr)
        if f"alpha_after{step}" in case:
            case.check(f"alpha_after{step}", head.alpha)
            case.check(f"beta_after{step}", head.beta)
            case.check(f"conf_w_after{step}", head.confidence.weight)
            case.check(f"conf_b_after{step}", head.confidence.bias)
    case.check("losses", torch.tensor(losses))
