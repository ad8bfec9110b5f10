"""taunorm_*: the original form (no bias, no background) and the detection form with its two select rules."""

import torch
from torch import Tensor

from calib.heads.combine import SelectHead
from calib.heads.linear import LinearClassifier, LinearHead
from calib.methods.tau_norm import TauNorm, normalised_classifier, tau_normalised

from .case import Case


def check(case: Case) -> None:
    if "counts" in case:
        _detection(case)
    else:
        _original(case)


def _original(case: Case) -> None:
    weight = tau_normalised(case["W"], case.hyper["tau"])
    case.check("W_tau", weight)
    case.check("logits", LinearClassifier(weight)(case["X"]))


def _detection(case: Case) -> None:
    classifier = LinearClassifier(case.background_last("W", 0), case.background_last("b"))
    original = LinearHead(classifier)
    normalised = LinearHead(normalised_classifier(classifier, case.hyper["tau"]))
    tail = case["counts"] < case.hyper.get("tail_below", TauNorm().tail_below)
    every = torch.ones_like(tail)

    def scores(head: LinearHead | SelectHead) -> Tensor:
        return head.full_scores(case["X"]).roll(1, 1)

    case.check("W_tau", normalised.classifier.weight.roll(1, 0))
    case.check("scores_orig", scores(original))
    case.check("scores_tau", scores(normalised))
    case.check("tail_mask", torch.cat([tail.new_zeros(1), tail]))
    case.check("scores_select_code", scores(SelectHead(original, normalised, tail)))
    case.check("scores_select_allfg", scores(SelectHead(original, normalised, every)))
