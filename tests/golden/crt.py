"""crt*: training steps of the linear layer, and the stream of the class-balanced sampler."""

import numpy as np
import torch

from calib.cache.index import ClassIndex
from calib.heads.linear import LinearClassifier
from calib.losses.softmax import cross_entropy
from calib.sampling.class_balanced import ClassBalancedSampler
from calib.settings import Loop
from calib.training.optimizer import Updater

from .case import Case


def check(case: Case) -> None:
    h = case.hyper
    classifier = LinearClassifier(case["W0"], case["b0"])
    updater = Updater(classifier, Loop(momentum=h["momentum"], weight_decay=h["weight_decay"]))
    losses = []
    for rows in case["batch_index"]:
        loss = cross_entropy(classifier(case["X"][rows]), case["y"][rows]).mean()
        losses.append(float(loss.detach()))
        updater.update(loss, h["lr"])
    case.check("losses", torch.tensor(losses))
    case.check("W", classifier.weight)
    case.check("b", classifier.bias)
    _sampler(case)


def _sampler(case: Case) -> None:
    """The order belongs to a generator; its structure is compared: what is true of their stream is true of ours."""
    labels, per_visit = case["sampler_labels"].numpy(), case.hyper["num_samples_cls"]
    c = int(labels.max()) + 1
    index = ClassIndex.of(labels, np.zeros(len(labels), np.int64), c)
    sampler = ClassBalancedSampler(
        index, rows_per_step=len(labels), background_share=0.0, seed=0, draws_per_visit=per_visit
    )
    n = len(case["sampler_sequence"])
    ours = np.concatenate([sampler.step(i).rows for i in range(-(-n // len(labels)))])[:n]
    for stream in (case["sampler_sequence"].numpy(), ours):
        _has_the_structure(labels, stream, per_visit, len(np.unique(labels)))


def _has_the_structure(labels: np.ndarray, stream: np.ndarray, per_visit: int, n_classes: int) -> None:
    of = labels[stream]
    visits = [of[i : i + per_visit] for i in range(0, len(of) - per_visit + 1, per_visit)]
    assert all(len(set(v)) == 1 for v in visits)
    order = [v[0] for v in visits]
    for start in range(0, len(order) - n_classes + 1, n_classes):
        assert len(set(order[start : start + n_classes])) == n_classes, "a pass visits every class once"
    for label in set(labels.tolist()):
        own, size = stream[of == label], int((labels == label).sum())
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size, "a class's rows come once per pass over them"
