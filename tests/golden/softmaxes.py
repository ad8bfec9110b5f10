"""focal_*, class_margin_*, balanced_softmax_*, logit_adjust*, reweight_*, group_softmax_*: softmax losses."""

import torch
from torch import Tensor

from calib.heads.linear import LinearClassifier
from calib.losses.group import Groups, group_losses, sample_others
from calib.losses.margin import class_margins, focal_values, log_prior, logit_adjustment, margin_values, shifted_values
from calib.losses.softmax import cross_entropy
from calib.methods.reweight import Reweight

from .case import Case


def _finish(case: Case, z: Tensor, loss: Tensor, *, gradient: str = "grad_logits", name: str = "loss") -> None:
    loss.backward()
    case.check(name, loss)
    case.check(gradient, z.grad)


def check_focal(case: Case) -> None:
    z = case.leaf("logits")
    _finish(case, z, focal_values(z, case["labels"], case.hyper["gamma"]).mean())
    case.check("scores", case["logits"].softmax(dim=1))


def check_margin(case: Case) -> None:
    z, margins, s = case.leaf("logits"), class_margins(case["counts"], case.hyper["max_m"]), case.hyper["s"]
    case.check("margins", margins)
    _finish(case, z, margin_values(z, case["labels"], margins, s).mean())
    case.check("scores", (s * case["logits"]).softmax(dim=1))


def check_balanced(case: Case) -> None:
    z = case.leaf("logits")
    _finish(case, z, shifted_values(z, case["labels"], log_prior(case["counts"])).mean())
    case.check("scores", case["logits"].softmax(dim=1))


def check_logit_adjustment(case: Case) -> None:
    adjustment, z = logit_adjustment(case["counts"], case.hyper["tau"]), case.leaf("logits")
    case.check("adjustment_f64", adjustment)
    case.check("posthoc_logits", case["logits"] - adjustment.float())
    loss = shifted_values(z, case["y"], adjustment.float()).mean()
    _finish(case, z, loss, gradient="d_logits", name="train_loss")


def check_reweight(case: Case) -> None:
    """The SimCal form keeps background last; the BAGS forms have it first."""
    h, z = case.hyper, case.leaf("logits")
    low, high = h["clamp" if "N" in h else "clip"]
    clipped = {"low": low, "high": high, "w_bg": h.get("w_bg", 1.0)}
    if "N" in h:
        weights = Reweight("reference", reference=h["N"], **clipped).weights(case["counts"])
        y, rows = case["labels"], h["avg_factor"]
        case.check("class_weight", weights)
        _finish(case, z, (weights[y] * cross_entropy(z, y)).sum() / rows)
        case.check("scores", case["logits"].softmax(dim=1))
        return
    form = {"by": "inverse"} if h["beta"] is None else {"by": "effective", "beta": h["beta"]}
    weights, y = Reweight(**form, **clipped).weights(case["counts"]), case.labels_last("y")
    case.check("class_weight", weights.roll(1))
    classifier = LinearClassifier(case.background_last("W", 0), case.background_last("b"))
    case.check("logits", classifier(case["X"]).roll(1, 1))
    loss = (weights[y] * cross_entropy(z.roll(-1, 1), y)).mean()
    _finish(case, z, loss, gradient="d_logits")


def check_group_softmax(case: Case) -> None:
    """Another encoding of balanced group softmax: [others, classes] per group, then [foreground, background]; every
    other row is sampled."""
    groups = Groups.from_counts(case["counts"], case.hyper["bins"])
    z, y = case.leaf("logits"), case["labels"]
    ours = torch.cat([z[:, [-1, -2]], z[:, :-2]], dim=1)
    chunk = torch.zeros_like(y)
    sampled = sample_others(groups, y, chunk, 1, 1e9, torch.Generator())
    _finish(case, z, group_losses(groups, ours, y, sampled, chunk, 1).sum())
    case.check("scores", groups.scores(ours))
