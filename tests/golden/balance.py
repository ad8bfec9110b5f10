"""loce*, bacl*, fasa*: what is weighed or drawn by what classes have scored so far."""

import torch
from torch import Tensor

from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.losses.equilibrium import drawing_probability, equilibrium_values
from calib.losses.pairwise import error_probability, pairwise_weights
from calib.methods.bacl import Confusion
from calib.methods.loce import MeanScores
from calib.parallel.distributed import ALONE
from calib.sampling.weighted import classes_at
from calib.training.batch import Batch
from calib.training.gaussians import RunningGaussians
from calib.training.virtual import adapted, first_probability

from .case import Case


def _batch(labels: Tensor, added: int = 0) -> Batch:
    n = len(labels) - added
    return Batch(
        0,
        torch.zeros(len(labels), 1),
        labels,
        torch.zeros_like(labels),
        1,
        rows=torch.arange(n).numpy(),
        added=(added,),
    )


def check_loce(case: Case) -> None:
    h, c, step = case.hyper, case["s0_logits"].shape[1] - 1, 0
    scores = MeanScores(c, h["alpha"], h["start"], h["bg_score"])
    while f"s{step}_logits" in case:
        if step:  # they set the background's at the end of the first step
            case.check(f"s{step}_mean_before", scores.mean)
        z, y = case.leaf(f"s{step}_logits"), case[f"s{step}_labels"]
        added = int(case[f"s{step}_memory"])
        of_row = case[f"s{step}_object"]
        scores.observe(z, _batch(y, added), of_row[: len(y) - added].numpy())
        case.check(f"s{step}_mean_score", scores.mean)
        loss = equilibrium_values(z, y, scores.mean).mean()
        loss.backward()
        case.check(f"s{step}_loss", loss)
        case.check(f"s{step}_grad_logits", z.grad)
        step += 1
    assert step > 0
    case.ignore("s0_mean_before")
    case.check("drawn", classes_at(drawing_probability(scores.mean), case["uniform"]))


def check_bacl(case: Case) -> None:
    h, c, step = case.hyper, case["s0_logits"].shape[1] - 1, 0
    confusion = Confusion(c, h["alpha"], h["prob_thr"])
    head = SigmoidHead(LinearClassifier(torch.eye(c + 1)), has_background=True)
    while f"s{step}_logits" in case:
        z, y = case.leaf(f"s{step}_logits"), case[f"s{step}_labels"]
        case.check(f"s{step}_weights", pairwise_weights(z, y, h["prob_thr"]))
        loss = confusion.values(z, y).mean()
        loss.backward()
        case.check(f"s{step}_loss", loss)
        case.check(f"s{step}_grad_logits", z.grad)
        case.check(f"s{step}_confusion_after", confusion.mean)
        case.check(f"s{step}_scores", head.full_scores(case[f"s{step}_logits"]))
        step += 1
    assert step > 0
    _gaussians(case, c)
    case.check("drawn", classes_at(error_probability(confusion.mean), case["uniform"]))


def _gaussians(case: Case, num_classes: int) -> None:
    gaussians, step = RunningGaussians(num_classes, case["f0_features"].shape[1], case.hyper["decay_ratio"]), 0
    while f"f{step}_features" in case:
        x, y = case[f"f{step}_features"], case[f"f{step}_labels"]
        gaussians.update(x, y, y, ALONE)
        case.check(f"f{step}_mean", gaussians.mean)
        case.check(f"f{step}_variance", gaussians.variance)
        step += 1


def check_fasa(case: Case) -> None:
    _gaussians(case, len(case["counts"]))
    p = first_probability(case["counts"], 1.0)
    case.check("probability", p)
    before, step = torch.zeros(0), 0
    while f"a{step}_total" in case:
        now = case[f"a{step}_total"] / case[f"a{step}_count"].sum()
        p = adapted(p, before[:-1] if step else now[:-1], now[:-1], case[f"a{step}_group"])
        case.check(f"a{step}_probability", p)
        before, step = now, step + 1
    assert step > 0
