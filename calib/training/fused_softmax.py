"""The step of a plain linear softmax head, shaped by hand: two matrix products and as few passes between as can be.

Letters: n rows of the step, D feature size, K outputs; a_i the share of row i in the loss.
Eq. (loss): L = sum_i a_i CE_i, CE_i = -log p_{i, y_i}, p = softmax(x W^T + b)
Eq. (gradients): G = a (p - onehot(y)), dL/dW = G^T x, dL/db = sum_i G_i

Autograd keeps the logits, their logarithms and the gradient apart, and fresh memory for each; here all live in one
place that is used again. In bfloat16, where the products are fast, that saves a fifth of the time of torch's autocast
(`benchmarks/training.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from calib.heads.linear import LinearClassifier
from calib.losses.softmax import chunk_shares, cross_entropy
from calib.training.batch import Batch, FusedLoss, Objective


class FusedSoftmax(FusedLoss):
    """``loss`` of the logits [n, K]; ``shares`` [n] says the same as a weighted sum of the rows' cross entropy."""

    def __init__(
        self,
        classifier: LinearClassifier,
        loss: Callable[[Tensor, Batch], Tensor],
        shares: Callable[[Batch], Tensor],
    ) -> None:
        self._classifier, self._loss, self._shares = classifier, loss, shares
        self._rows: _Buffers | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss, for autograd."""
        return self._loss(self._classifier(batch.features), batch)

    @torch.no_grad()
    def gradients(self, batch: Batch) -> Tensor:
        """The loss; puts its gradient in bfloat16 products into ``grad`` of weight and bias."""
        weight, bias, n = self._classifier.weight, self._classifier.bias, len(batch.labels)
        if self._rows is None or len(self._rows.x) < n:
            self._rows = _Buffers(n, weight)
        buffers, target, share = self._rows, batch.labels[:, None], self._shares(batch)[:, None]
        x, z, p = buffers.x[:n].copy_(batch.features), buffers.z[:n], buffers.p[:n]
        torch.mm(x, buffers.weight.copy_(weight).t(), out=z)
        p.copy_(z)
        if bias is not None:
            p.add_(bias)
        torch.softmax(p, 1, out=p)
        of_target = p.gather(1, target)
        # The floor keeps the figure finite where the true class's share underflows; the gradient needs no logarithm.
        loss = -(share * of_target.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()  # Eq. (loss)
        p.scatter_(1, target, of_target - 1)
        if bias is not None:
            bias.grad = torch.mv(p.t(), share[:, 0])  # before the shares are in: a product is faster than a sum
        p.mul_(share)  # Eq. (gradients), G
        torch.mm(z.copy_(p).t(), x, out=buffers.product)
        weight.grad = buffers.gradient.copy_(buffers.product)
        return loss


class _Buffers:
    """Memory of ``gradients`` for up to ``n`` rows."""

    def __init__(self, n: int, weight: Tensor) -> None:
        outputs, size = weight.shape
        half, device = torch.bfloat16, weight.device
        self.x = torch.empty(n, size, dtype=half, device=device)
        self.z = torch.empty(n, outputs, dtype=half, device=device)
        self.p = torch.empty(n, outputs, device=device)
        self.weight, self.product = torch.empty_like(weight, dtype=half), torch.empty_like(weight, dtype=half)
        self.gradient = torch.empty_like(weight)


def mean_over_rows(classifier: LinearClassifier) -> Objective:
    """The mean cross entropy of all rows of a step."""

    def loss(z: Tensor, batch: Batch) -> Tensor:
        return batch.row_mean(cross_entropy(z, batch.labels))

    def shares(batch: Batch) -> Tensor:
        return torch.full(batch.labels.shape, 1 / len(batch.all_labels), device=batch.labels.device)

    return _objective(classifier, loss, shares)


def mean_over_chunks(classifier: LinearClassifier) -> Objective:
    """The mean over chunks of their mean cross entropy."""

    def loss(z: Tensor, batch: Batch) -> Tensor:
        return batch.chunk_mean(cross_entropy(z, batch.labels))

    def shares(batch: Batch) -> Tensor:
        return batch.world.shard(chunk_shares(batch.all_chunk, batch.n_chunks))

    return _objective(classifier, loss, shares)


def _objective(
    classifier: LinearClassifier, loss: Callable[[Tensor, Batch], Tensor], shares: Callable[[Batch], Tensor]
) -> Objective:
    step = FusedSoftmax(classifier, loss, shares)
    return step if classifier.form == "linear" else step.__call__  # the gradients are those of the plain form
