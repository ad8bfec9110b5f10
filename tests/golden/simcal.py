"""simcal_*: composition of a step, the image sampler, the heads, the inference rules."""

from itertools import pairwise

import numpy as np
import torch

from calib.cache.index import ClassIndex
from calib.heads.combine import AverageHead, DualHead
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.mlp import MLPHead
from calib.losses.softmax import cross_entropy
from calib.methods.simcal import is_tail
from calib.sampling.bilevel import compose, draw_episode
from calib.sampling.step import Rows
from calib.settings import Loop
from calib.training.optimizer import Updater

from .case import Case


def check(case: Case) -> None:
    """Each form is known by an array that only it has."""
    forms = {"bg_perm": _compose, "class_indices": _sampler, "s0_X": _head, "logits_cal": _dual}
    found = [form for key, form in forms.items() if key in case]
    assert len(found) == 1, f"{case.name} has the form of none of: {', '.join(forms)}"
    found[0](case)


def _compose(case: Case) -> None:
    """Negatives come first, in the order of the permutation given; then each image's positives of its own class."""
    per_image = case["pos_per_image"].numpy()
    positive = case["pos_labels"].numpy() - 1
    classes = case["class_per_image"].numpy() - 1
    background = int(max(positive.max(initial=0), classes.max(initial=0))) + 1
    n_negative = len(case["neg_feats"])
    labels = np.concatenate([np.full(n_negative, background), positive])
    image = np.concatenate([np.zeros(n_negative, np.int64), np.repeat(np.arange(len(per_image)), per_image)])
    index = ClassIndex.of(labels, image, background)
    rows = compose(index, classes, np.arange(len(classes)), case["bg_perm"].numpy())
    features = torch.cat([case["neg_feats"], case["pos_feats"]])
    case.check("batch_X", features[rows])
    case.check("batch_y", (torch.from_numpy(labels[rows]) + 1) % (background + 1))


def _sampler(case: Case) -> None:
    """The bits belong to a generator: membership, uniformity and replacement are what is compared."""
    offsets, nc = case["class_image_offsets"].tolist(), case.hyper["nc"]
    images = {c: case["class_images"].numpy()[a:b] for c, (a, b) in enumerate(pairwise(offsets), start=1)}
    theirs = case["class_indices"].numpy().reshape(-1, nc), case["image_indices"].numpy().reshape(-1, nc)
    assert len(theirs[0]) == case.hyper["episodes"]
    _only_members(images, *theirs)
    rng = np.random.default_rng(0)
    episodes = [draw_episode(rng, images, nc) for _ in range(20 * case.hyper["episodes"])]
    classes, drawn = (np.stack(part) for part in zip(*episodes, strict=True))
    assert classes.shape == drawn.shape == (20 * case.hyper["episodes"], nc)
    _only_members(images, classes, drawn)
    usable = [c for c, m in images.items() if len(m)]
    # Classes weighted by their counts (tau above 0), which is not what the paper does, are not uniform in theirs.
    _is_uniform(np.bincount(theirs[0].ravel(), minlength=len(images) + 1)[usable])
    _is_uniform(np.bincount(classes.ravel(), minlength=len(images) + 1)[usable])
    for c in usable:
        own = np.searchsorted(np.sort(images[c]), drawn[classes == c])
        _is_uniform(np.bincount(own, minlength=len(images[c])))
    if nc > 1:
        assert any(len(set(episode.tolist())) < nc for episode in classes), "classes are drawn with replacement"


def _only_members(images: dict[int, Rows], classes: Rows, drawn: Rows) -> None:
    """Every drawn image has the class it was drawn for; classes without images are never drawn."""
    for c, m in zip(classes.ravel().tolist(), drawn.ravel().tolist(), strict=True):
        assert m in images[c]


def _is_uniform(counts: Rows) -> None:
    """Chi-square below its point at 5 standard deviations (Wilson and Hilferty)."""
    freedom = len(counts) - 1
    expected = counts.sum() / len(counts)
    if freedom == 0:
        return
    limit = freedom * (1 - 2 / (9 * freedom) + 5 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < limit, counts


def _head(case: Case) -> None:
    layers = [k.removeprefix("init.").removesuffix(".weight") for k in case.keys("init.") if k.endswith(".weight")]
    sizes = [case[f"init.{layers[0]}.weight"].shape[1], *(len(case[f"init.{name}.weight"]) for name in layers)]
    head = MLPHead(sizes)
    parameters = [f"{name}.{part}" for name in layers for part in ("weight", "bias")]
    with torch.no_grad():
        for p, name in zip(head.parameters(), parameters, strict=True):
            p.copy_(case[f"init.{name}"])
    h = case.hyper
    updater = Updater(head, Loop(momentum=h["momentum"], weight_decay=h["weight_decay"]))
    step = 0
    while f"s{step}_X" in case:
        z = head.logits(case[f"s{step}_X"].flatten(1))
        loss = cross_entropy(z, case[f"s{step}_y"]).mean()
        case.check(f"s{step}_logits", z)
        case.check(f"s{step}_loss", loss)
        updater.update(loss, h["lr"])
        for p, name in zip(head.parameters(), parameters, strict=True):
            case.check(f"s{step}_after.{name}", p)
        step += 1
    assert step > 0


def _dual(case: Case) -> None:
    """Each head reads its own half of the features, which are its logits."""
    logits = torch.cat([case.background_last(f"logits_{k}") for k in ("orig", "cal")], dim=1)
    eye, zero = torch.eye(logits.shape[1] // 2), torch.zeros(logits.shape[1] // 2, logits.shape[1] // 2)
    original = LinearHead(LinearClassifier(torch.cat([eye, zero], dim=1)))
    calibrated = LinearHead(LinearClassifier(torch.cat([zero, eye], dim=1)))
    # Counts are whole: "less than T" is "at most T - 1".
    strict = {"strictly less": 1, "less or equal": 0}[case.hyper["comparison"]]
    mask = is_tail(case["counts"], case.hyper["threshold_code"] - strict)
    case.check("use_cal", torch.cat([mask.new_zeros(1), mask]))
    case.check("scores", DualHead(calibrated, original, mask).full_scores(logits).roll(1, 1))
    for key in case.keys("scores_paper_T"):
        at_most = int(key.removeprefix("scores_paper_T").removesuffix("_le"))
        paper = DualHead(calibrated, original, is_tail(case["counts"], at_most))
        case.check(key, paper.full_scores(logits).roll(1, 1))
    case.check("scores_avg_baseline", AverageHead(original, calibrated).full_scores(logits).roll(1, 1))
