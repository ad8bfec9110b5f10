"""text*: cosine to vectors of names (``C + 1`` columns there: the background's vector is 0)."""

import torch

from calib.heads.text import TextHead

from .case import Case


def check(case: Case) -> None:
    h = case.hyper
    head = TextHead(case["embeddings"], case["X"].shape[1], "sigmoid", h["temperature"], h["bias"] != 0)
    head.reset(h["bias"], torch.Generator())
    with torch.no_grad():
        head.projection.weight.copy_(case["W"])
        head.projection.bias.copy_(case["b"])
    z = head.raw(case["X"])
    case.check("logits", torch.cat([z, torch.full_like(z[:, :1], h["bias"])], dim=1))
    other = head.named(case["other"])
    case.check("other_logits", other.raw(case["X"]))
    assert other.scores(case["X"]).shape == case["other_logits"].shape
