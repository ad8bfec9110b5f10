"""eql_*, eqlv2_*, balanced_sigmoid_*: losses of sigmoid classifiers."""

import torch

from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.losses.sigmoid import balanced_sigmoid_values, eql_values, eql_weights, one_hot
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
