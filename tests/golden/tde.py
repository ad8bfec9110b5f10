"""tde_*: the normalised head in training, its moving direction, both readings of the inference."""

import torch

from calib.heads.tde import TDEHead
from calib.losses.softmax import cross_entropy

from .case import Case


def _head(case: Case, *, quirks: bool) -> TDEHead:
    h, weight = case.hyper, case["weight"]
    head = TDEHead(
        len(weight) - 1,
        weight.shape[1],
        heads=h["num_head"],
        scale=h["scale_per_head"] * h["num_head"],
        gamma=h["gamma"],
        alpha=h["alpha"],
        official_quirks=quirks,
    )
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def check(case: Case) -> None:
    official, fixed = _head(case, quirks=True), _head(case, quirks=False)
    step = 0
    while f"s{step}_X" in case:
        x, y = case.leaf(f"s{step}_X"), case[f"s{step}_labels"]
        for head, name in ((official, "official"), (fixed, "fixed")):
            head.follow(x, y, case.hyper["mu"])
            case.check(f"s{step}_causal_embed_after_{name}", head.direction[None])
        fixed.weight.grad = None
        z = fixed.logits(x)
        loss = cross_entropy(z, y).mean()
        loss.backward()
        case.check(f"s{step}_logits_train", z)
        case.check(f"s{step}_loss", loss)
        case.check(f"s{step}_grad_weight", fixed.weight.grad)
        case.check(f"s{step}_grad_X", x.grad)
        step += 1
    x = case["infer_X"]
    case.check("infer_logits", fixed.logits(x))
    case.check("infer_tde_logits", official.tde_logits(x))
    case.check("infer_scores_bg_exempt_fixed_embed", fixed.full_scores(x))
    case.check("infer_scores_after_second_softmax_official", official.full_scores(x))
    official.official_quirks = False
    case.check("infer_scores_bg_exempt_official", official.full_scores(x))
