"""Tiny random one-stage detectors of torchvision, whose scores are spread."""

from typing import Any

import torch
from torch import nn

CLASSES = 4
KINDS = ("retinanet", "fcos", "ssd", "ssdlite")


class _Pyramid(nn.Module):
    """Two levels of the given widths, strides 8 and 16."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, one, 3, 8, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(one, two, 3, 2, 1), nn.ReLU())
        self.out_channels: Any = one if one == two else [one, two]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        one = self.one(x)
        return {"0": one, "1": self.two(one)}


def build(kind: str, seed: int = 0, **more: Any) -> Any:
    """One of ``KINDS`` in eval mode, labels from 1."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    torch.manual_seed(seed)
    model: Any
    if kind == "retinanet":
        anchors = AnchorGenerator(((12, 20), (30, 40)), ((0.5, 1.0, 2.0),) * 2)
        model = RetinaNet(_Pyramid(8, 8), CLASSES + 1, min_size=40, max_size=64, anchor_generator=anchors, **more)
    elif kind == "fcos":
        anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
        model = FCOS(_Pyramid(32, 32), CLASSES + 1, min_size=40, max_size=64, anchor_generator=anchors, **more)
    else:
        boxes = DefaultBoxGenerator([[2], [2, 3]])
        head = (
            SSDLiteHead([8, 16], boxes.num_anchors_per_location(), CLASSES + 1, nn.BatchNorm2d)
            if kind == "ssdlite"
            else None
        )
        model = SSD(_Pyramid(8, 16), boxes, (48, 64), CLASSES + 1, head=head, **more)
    # Untrained scores and offsets are all alike; spread them so that every step has something to decide.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 4 and "head" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.4 / p[0].numel() ** 0.5))
            if name.endswith(("cls_logits.bias", "bbox_ctrness.bias")):
                p.copy_(torch.randn(p.shape, generator=generator) - 1)
            if "bbox_reg." in name:
                p.mul_(0.3)
    return model.eval()
