"""taunorm_*: the original form (no bias, no background) and the detection form with its two select rules."""

import torch

from calib.heads.tau_norm import select_rows, tau_normalised

from .case import Case


def check(case: Case) -> None:
    tau = case.hyper["tau"]
    if case.name.startswith("taunorm_orig"):
        weight = tau_normalised(case["W"], tau)
        case.check("W_tau", weight)
        case.check("logits", case["X"] @ weight.T)
        return
    weight = case.background_last("W", 0).clone()
    original = case["X"] @ weight.T + case.background_last("b")
    weight[:-1] = tau_normalised(weight[:-1], tau)
    normalised = case["X"] @ weight.T + case.background_last("b")
    p0, p1 = original.softmax(dim=1), normalised.softmax(dim=1)
    case.check("W_tau", weight.roll(1, 0))
    case.check("scores_orig", p0.roll(1, 1))
    case.check("scores_tau", p1.roll(1, 1))
    tail = case["counts"] < 100
    case.check("tail_mask", torch.cat([tail.new_zeros(1), tail]))
    case.check("scores_select_code", select_rows(p0, p1, tail).roll(1, 1))
    case.check("scores_select_allfg", select_rows(p0, p1, torch.ones_like(tail)).roll(1, 1))
