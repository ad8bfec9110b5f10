"""simcal_*: composition of a step, the image sampler, the heads, the inference rules."""

from itertools import pairwise

import numpy as np
import torch

from calib.cache.index import ClassIndex
from calib.heads.combine import AverageHead, choose_columns
from calib.heads.fit import Updater
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.mlp import MLPHead
from calib.heads.simcal import is_tail
from calib.losses.softmax import cross_entropy
from calib.sampling.bilevel import compose, draw_episode
from calib.settings import Loop

from .case import Case


def check(case: Case) -> None:
    kind = case.name.split("_")[1]
    {"compose": _compose, "sampler": _sampler, "head": _head, "dual": _dual}[kind](case)


def _compose(case: Case) -> None:
    """Negatives come first, in the order of the permutation given; then each image's positives of its own class."""
    per_image = case["pos_per_image"].numpy()
    positive = case["pos_labels"].numpy() - 1
    classes = case["class_per_image"].numpy() - 1
    background = int(max(positive.max(), classes.max())) + 1
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
    usable = {c for c, m in images.items() if len(m)}
    theirs = case["class_indices"].tolist()
    assert set(theirs) <= usable
    for c, m in zip(theirs, case["image_indices"].tolist(), strict=True):
        assert m in images[c]
    rng = np.random.default_rng(0)
    episodes = [draw_episode(rng, images, nc) for _ in range(20 * case.hyper["episodes"])]
    drawn = np.concatenate([c for c, _ in episodes])
    assert set(drawn.tolist()) == usable
    assert all(int(m) in images[int(c)] for classes, of in episodes for c, m in zip(classes, of, strict=True))
    expected = len(drawn) / len(usable)
    counts = np.bincount(drawn, minlength=len(images) + 1)[sorted(usable)]
    assert ((counts - expected) ** 2 / expected).sum() < 3 * len(usable)  # chi-square, far beyond its 99.99 % point
    assert any(len(set(classes.tolist())) < nc for classes, _ in episodes)


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
    original, calibrated = (case.background_last(f"logits_{k}").softmax(dim=1) for k in ("orig", "cal"))
    threshold = case.hyper["threshold_code"] - (case.hyper["comparison"] == "strictly less")
    mask = is_tail(case["counts"], threshold)
    case.check("use_cal", torch.cat([mask.new_zeros(1), mask]))
    case.check("scores", choose_columns(calibrated, original, mask).roll(1, 1))
    paper = is_tail(case["counts"], 300)
    case.check("scores_paper_T300_le", choose_columns(calibrated, original, paper).roll(1, 1))
    # Identity weights make logits of features: the averaging head itself is what runs.
    k = original.shape[1]
    head = AverageHead(*(LinearHead(LinearClassifier(w * torch.eye(k))) for w in (1.0, 0.5)))
    found = head.full_scores(case.background_last("logits_orig"))
    half = (0.5 * case.background_last("logits_orig")).softmax(dim=1)
    assert torch.allclose(found, 0.5 * (original + half))
    case.check("scores_avg_baseline", 0.5 * (original + calibrated).roll(1, 1))
