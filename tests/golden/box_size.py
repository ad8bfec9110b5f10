"""box_size*: confidence maps by box size, whose knots are mean scores and precisions of equal numbers of detections."""

import torch

from calib.decide.confidence import Confidence, _histogram, _tensors, sizes_of
from calib.heads.by_size import BySizeHead
from calib.heads.linear import LinearClassifier, LinearHead

from .case import Case


def check(case: Case) -> None:
    h = case.hyper
    edges, size = sizes_of(case["area"].numpy(), h["sizes"])
    case.check("edges", torch.from_numpy(edges))
    case.check("size", torch.from_numpy(size))
    how = Confidence("histogram", "size", strength=0.0, sizes=h["sizes"], score_bins=h["score_bins"])
    maps = _histogram(case["score"].numpy(), case["is_true"].numpy().astype(float), size, len(edges) + 1, how)
    one, two, between = _tensors(*maps, edges)
    head = BySizeHead(LinearHead(LinearClassifier(torch.zeros(2, 1))), "knots", between, one, two)
    within = [0.0, *edges.tolist()]
    for key in list(case.keys("map")):
        areas = torch.full_like(case["test"], within[int(key.removeprefix("map"))] + 1e-3)
        case.check(key, head.mapped(case["test"].float(), areas))
