"""bags_*: groups, loss per group with the sampled `others` given, gradients, scores, training, the sampling rule."""

import torch
from torch import Tensor

from calib.heads.group import GroupHead
from calib.losses.group import Groups, group_losses, sample_others
from calib.settings import Loop
from calib.training.optimizer import Updater

from .case import Case


def check(case: Case) -> None:
    groups = Groups.from_counts(case["counts"], case.hyper.get("boundaries", (10, 100, 1000)))
    case.check("label2bin", groups.local.roll(1, dims=1))
    case.check("pred_slice", torch.tensor([[s.start, s.stop - s.start] for s in groups.slices]))
    sizes = [int((groups.local[g] > 0).sum()) for g in range(1, len(groups.slices))]
    assert sizes == case.description.get("group_sizes", sizes)
    for g in range(1, len(groups.slices)):
        if f"group{g}_category_ids" in case:
            case.check(f"group{g}_category_ids", torch.nonzero(groups.local[g]).flatten() + 1)
    if "batch_index" in case:
        _trajectory(case, groups)
    elif case["y"].ndim > 1:
        _batches(case, groups)
    else:
        _single(case, groups)


def _losses(groups: Groups, z: Tensor, y: Tensor, sampled: Tensor) -> Tensor:
    return group_losses(groups, z, y, sampled > 0, torch.zeros_like(y), 1)[:, 0]


def _single(case: Case, groups: Groups) -> None:
    y, sampled = case.labels_last("y"), case["sampled"]
    _follows_the_rule(groups, y, sampled, case.hyper["beta"])
    z = case.leaf("logits")
    per_group = _losses(groups, z, y, sampled)
    per_group.sum().backward()
    case.check("loss_per_group", per_group)
    case.check("loss", per_group.sum())
    case.check("d_logits", z.grad)
    case.check("scores", groups.scores(case["logits"]).roll(1, 1))
    if "bin_labels" in case:
        case.check("bin_labels", groups.local[:, y])
        case.check("avg_factor", sampled.sum(dim=1).clamp_min(1))
    if "W" in case:
        head = GroupHead(groups, case["X"].shape[1])
        with torch.no_grad():
            head.classifier.weight.copy_(case["W"])
            head.classifier.bias.copy_(case["b"])
        case.check("logits", head.classifier(case["X"]))
        case.check("scores", head.full_scores(case["X"]).roll(1, 1))
        _losses(groups, head.classifier(case["X"]), y, sampled).sum().backward()
        case.check("d_W", head.classifier.weight.grad)
        case.check("d_b", head.classifier.bias.grad)


def _batches(case: Case, groups: Groups) -> None:
    """Several batches; each alone and all of them as the chunks of one step."""
    y, sampled, z = case.labels_last("y"), case["sampled"], case.leaf("logits")
    for labels, rows in zip(y, sampled, strict=True):
        _follows_the_rule(groups, labels, rows, case.hyper["beta"])
    alone = torch.stack([_losses(groups, *batch) for batch in zip(z, y, sampled, strict=True)])
    alone.sum().backward()
    case.check("loss_per_group", alone)
    case.check("d_logits", z.grad)
    chunk = torch.arange(len(y)).repeat_interleave(y.shape[1])
    together = sampled.transpose(0, 1).flatten(1) > 0
    case.check("loss_per_group", group_losses(groups, z.flatten(0, 1), y.flatten(), together, chunk, len(y)).T)


def _trajectory(case: Case, groups: Groups) -> None:
    h = case.hyper
    head = GroupHead(groups, case["X"].shape[1])
    with torch.no_grad():
        head.classifier.weight.copy_(case["W0"])
    loop = Loop(momentum=h["momentum"], weight_decay=h["weight_decay"], clip_norm=h["grad_clip_norm"])
    updater, losses, norms = Updater(head, loop), [], []
    for rows, sampled in zip(case["batch_index"], case["sampled"], strict=True):
        y = case.labels_last("y")[rows]
        _follows_the_rule(groups, y, sampled, h["beta"])
        loss = _losses(groups, head.classifier(case["X"][rows]), y, sampled).sum()
        losses.append(float(loss.detach()))
        norms.append(updater.update(loss, h["lr"]))
    case.check("losses", torch.tensor(losses))
    case.check("grad_norm", torch.tensor(norms))
    case.check("W", head.classifier.weight)
    case.check("b", head.classifier.bias)


def _follows_the_rule(groups: Groups, y: Tensor, sampled: Tensor, beta: float) -> None:
    """The reference's draw and ours take the same number of rows of each kind."""
    chunk = torch.zeros_like(y)
    ours = sample_others(groups, y, chunk, 1, beta, torch.Generator().manual_seed(0))
    positive = groups.local[:, y] > 0
    assert torch.equal(ours.sum(dim=1), (sampled > 0).sum(dim=1))
    assert torch.equal((ours & positive).sum(dim=1), ((sampled > 0) & positive).sum(dim=1))
