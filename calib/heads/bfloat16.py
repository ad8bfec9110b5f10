"""Heads whose large matrix products run in bfloat16: about half the time on CPUs that have instructions for it.

Inputs and weights of every linear layer (not the distances of NCM, not TDE's groups) are rounded to bfloat16, products
are summed in float32 inside the multiplication and its result is rounded to bfloat16 once more: logits are off by up
to 0.4 % of the largest product sum. Bias, scale, softmax and everything else stay float32.
"""

from torch import Tensor, nn
from torch.nn import functional

from calib.heads.base import Head
from calib.heads.linear import LinearClassifier, directions_of_features, directions_of_weight


class BFloat16Linear(nn.Module):
    """[N, D] float32 -> [N, K] float32: a classifier or linear layer with its product in bfloat16."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, layer: LinearClassifier | nn.Linear) -> None:
        super().__init__()
        form = layer.form if isinstance(layer, LinearClassifier) else "linear"
        self.form = form
        weight = directions_of_weight(layer.weight.detach(), form)
        self.register_buffer("weight", weight.bfloat16())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        scale = layer.scale if isinstance(layer, LinearClassifier) else None
        self.register_buffer("scale", None if scale is None else scale.detach())

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, K]."""
        x = directions_of_features(features, self.form)
        z = functional.linear(x.bfloat16(), self.weight).float()
        if self.scale is not None:
            z *= self.scale
        return z if self.bias is None else z.add_(self.bias)


def in_bfloat16(head: Head) -> Head:
    """``head`` with its linear layers replaced; it computes scores as before but can neither be trained nor saved.

    Layers with a single output (DisAlign's confidence) cost nothing and stay as they are.
    """
    for module in list(head.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LinearClassifier | nn.Linear) and len(layer.weight) > 1:
                module.register_module(name, BFloat16Linear(layer))
    return head
