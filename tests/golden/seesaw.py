"""seesaw_*: the loss with online counts, the normalised head in training, the average of two heads."""

import torch

from calib.heads.combine import AverageHead
from calib.heads.linear import LinearClassifier
from calib.heads.objectness import ObjectnessHead
from calib.losses.seesaw import add_counts, objectness_values, seesaw_scores, seesaw_values
from calib.settings import Loop
from calib.training.optimizer import Updater

from .case import Case


def check(case: Case) -> None:
    if "scores_avg" in case:
        _average(case)
    elif "weight0" in case:
        _head(case)
    else:
        _loss(case)


def _loss(case: Case) -> None:
    h, counts, step = case.hyper, case["cum_samples_before_step0"], 0
    c = len(counts) - 1
    while f"s{step}_logits" in case:
        z, y = case.leaf(f"s{step}_logits"), case[f"s{step}_labels"]
        counts = add_counts(counts, y)
        classes = seesaw_values(z[:, :c], y, counts[:c], h["p"], h["q"], h["eps"]).sum() / h["avg_factor"]
        pair = objectness_values(z[:, c:], y, c).sum() / h["avg_factor"]
        classes, pair = (h.get("loss_weight", 1) * part for part in (classes, pair))
        (classes + pair).backward()
        case.check(f"s{step}_loss_classes", classes)
        case.check(f"s{step}_loss_objectness", pair)
        case.check(f"s{step}_grad_logits", z.grad)
        case.check(f"s{step}_cum_samples_after", counts)
        case.check(f"s{step}_scores", seesaw_scores(case[f"s{step}_logits"]))
        step += 1
    assert step > 0


def _head(case: Case) -> None:
    """SGD of rate .02, momentum .9, decay 1e-4, as the case's method line says."""
    h, tau = case.hyper, torch.tensor([case.hyper["tau"]])
    head = ObjectnessHead(LinearClassifier(case["weight0"], case["bias0"], tau, "normed"))
    c = head.num_classes
    updater = Updater(head, Loop(momentum=h.get("momentum", 0.9), weight_decay=h.get("weight_decay", 1e-4)))
    counts, step, x = torch.zeros(c + 1), 0, torch.empty(0)
    while f"s{step}_X" in case:
        x, y = case.leaf(f"s{step}_X"), case[f"s{step}_labels"]
        z = head.classifier(x)
        counts = add_counts(counts, y)
        values = seesaw_values(z[:, :c], y, counts[:c], h["p"], h["q"], h.get("seesaw_eps", 0.01))
        loss = (values + objectness_values(z[:, c:], y, c)).mean()
        updater.update(loss, h.get("lr", 0.02))
        case.check(f"s{step}_logits", z)
        case.check(f"s{step}_loss", loss)
        case.check(f"s{step}_grad_weight", head.classifier.weight.grad)
        case.check(f"s{step}_grad_bias", head.classifier.bias.grad)
        case.check(f"s{step}_grad_X", x.grad)
        case.check(f"s{step}_weight_after", head.classifier.weight)
        case.check(f"s{step}_bias_after", head.classifier.bias)
        case.check(f"s{step}_cum_samples_after", counts)
        step += 1
    case.check("infer_scores", head.full_scores(x.detach()))


def _average(case: Case) -> None:
    """Two objectness heads whose features are their logits."""
    one, other = (case[f"logits_{k}"] for k in ("orig", "new"))
    k = one.shape[1]
    take = [torch.cat([torch.eye(k), torch.zeros(k, k)], 1), torch.cat([torch.zeros(k, k), torch.eye(k)], 1)]
    heads = [ObjectnessHead(LinearClassifier(w)) for w in take]
    case.check("scores_orig", seesaw_scores(one))
    case.check("scores_new", seesaw_scores(other))
    case.check("scores_avg", AverageHead(*heads).full_scores(torch.cat([one, other], dim=1)))
