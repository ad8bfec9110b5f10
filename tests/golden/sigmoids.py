"""eql_*, eqlv2_*, balanced_sigmoid_*, gol_*, ecm_*, efl*: losses of sigmoid and Gumbel classifiers."""

import torch
from torch import Tensor

from calib.heads.gumbel import GumbelHead
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.losses.gumbel import drop_weights, gumbel_bce, tail_ratio
from calib.losses.sigmoid import (
    balanced_sigmoid_values,
    ecm_shift,
    ecm_weights,
    eql_values,
    eql_weights,
    one_hot,
    weighted_bce,
)
from calib.methods.efl import FocusBalance
from calib.methods.eql_v2 import GradientBalance

from .case import Case


def _scores(logits: torch.Tensor, *, has_background: bool) -> torch.Tensor:
    head = SigmoidHead(LinearClassifier(torch.eye(logits.shape[1])), has_background=has_background)
    return head.full_scores(logits)


def check_eql(case: Case) -> None:
    tail, y, z = case["image_freq"] < case.hyper["lambda"], case["labels"], case.leaf("logits")
    loss = eql_values(z, y, tail).mean()
    loss.backward()
    case.check("weights", eql_weights(y, tail))
    case.check("loss", loss)
    case.check("grad_logits", z.grad)
    case.check("scores", _scores(case["logits"], has_background=False))


def check_eql_v2(case: Case) -> None:
    h, step = case.hyper, 0
    c = case["s0_logits"].shape[1] - 1
    balance = GradientBalance(c, h["gamma"], h["mu"], h["alpha"], h["init_ratio"])
    while f"s{step}_logits" in case:
        z, y = case.leaf(f"s{step}_logits"), case[f"s{step}_labels"]
        loss = balance.values(z, one_hot(y, c + 1)).mean()
        loss.backward()
        case.check(f"s{step}_loss", loss)
        case.check(f"s{step}_grad_logits", z.grad)
        case.check(f"s{step}_pos_grad_after", balance.positive)
        case.check(f"s{step}_neg_grad_after", balance.negative)
        case.check(f"s{step}_pos_neg_after", balance.ratio)
        case.check(f"s{step}_scores", _scores(case[f"s{step}_logits"], has_background=True))
        step += 1
    assert step > 0


def check_balanced(case: Case) -> None:
    z = case.leaf("logits")
    loss = balanced_sigmoid_values(z, case["labels"], case["image_freq"]).mean()
    loss.backward()
    case.check("loss", loss)
    case.check("grad_logits", z.grad)
    case.check("scores", _scores(case["logits"], has_background=False))


def _finish(case: Case, z: Tensor, loss: Tensor) -> None:
    loss.backward()
    case.check("loss", loss)
    case.check("grad_logits", z.grad)


def check_gol(case: Case) -> None:
    """With ``uniform`` numbers the negatives of tail classes are dropped by them, else none."""
    z, y = case.leaf("logits"), case["labels"]
    c, weights = z.shape[1], torch.ones_like(z)
    if "uniform" in case:
        tail, chunk = case["image_freq"] < case.hyper["lambda"], torch.zeros_like(y)
        weights = drop_weights(y, tail, tail_ratio(y, tail, chunk, 1), case["uniform"])
        case.check("weights", weights)
    _finish(case, z, (weights * gumbel_bce(z, one_hot(y, c))).sum() / len(y))
    head = GumbelHead(LinearClassifier(torch.eye(c, dtype=z.dtype)))
    scores = head.full_scores(case["logits"])
    case.check("scores", scores if case["scores"].shape[1] > c else scores[:, :c])
    torch.testing.assert_close(head.forward(case["logits"]).sigmoid(), scores[:, :c])


def check_ecm(case: Case) -> None:
    counts = case["counts"].double()
    counts = torch.cat([counts, counts.sum()[None] * case.hyper["fg_bg_ratio"]])
    shift, weights, z = ecm_shift(counts, 0.25), ecm_weights(counts), case.leaf("logits")
    case.check("class_weight", weights)
    torch.testing.assert_close((case["pos_w"] - case["neg_w"]).float(), shift, atol=1e-5, rtol=1e-5)
    _finish(case, z, weighted_bce(2 * z + shift, one_hot(case["labels"], z.shape[1]), weights).mean())
    case.check("scores", _scores(case["logits"].float(), has_background=True))


def check_efl(case: Case) -> None:
    h, step = case.hyper, 0
    c = case["s0_logits"].shape[1]
    balance = FocusBalance(c, h["focal_gamma"], h["scale_factor"], h["focal_alpha"])
    while f"s{step}_logits" in case:
        z, y = case.leaf(f"s{step}_logits"), case[f"s{step}_labels"]
        case.check(f"s{step}_ratio_before", balance.ratio)
        share = torch.full(y.shape, 1 / max(int((y < c).sum()), 1))
        loss = (share * balance.values(z, one_hot(y, c), share)).sum()
        loss.backward()
        case.check(f"s{step}_loss", loss)
        case.check(f"s{step}_grad_logits", z.grad)
        case.check(f"s{step}_pos_grad_after", balance.positive)
        case.check(f"s{step}_neg_grad_after", balance.negative)
        case.check(f"s{step}_pos_neg_after", balance.ratio)
        step += 1
    assert step > 0
