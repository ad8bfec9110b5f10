"""EfficientNet-Lite0: layer for layer the network of the package efficientnet_lite_pytorch 0.1.0, which gave numbers.

Its weights were set by ``wave`` under its own names, and its levels at strides 4, 8 and 16 looked at in eval mode.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.data.detector import load_detector, save_detector, shapes_detector
from calib.data.lite import LiteBackbone, _their_name
from calib.errors import FormatError, MissingFileError

# Shape, mean, mean of absolute values, five values in even steps.
GOLDEN: list[tuple[list[int], float, float, list[float]]] = [
    ([2, 24, 16, 24], -0.01937793915446188, 0.7090059057975142,
     [2.6291561126708984, 0.2801000773906708, 0.36738383769989014, 0.3807987868785858, -0.979552149772644]),
    ([2, 40, 8, 12], -0.045517097093397754, 1.1536343099588218,
     [2.269012928009033, -1.3303098678588867, -1.5290422439575195, 0.2618953585624695, 1.5423948764801025]),
    ([2, 112, 4, 6], -0.06857288479278352, 1.6549747552559158,
     [3.731142282485962, 2.1967742443084717, -0.502200722694397, -0.6456102132797241, 1.519731044769287]),
]  # fmt: skip


def wave(shape: tuple[int, ...], k: int) -> Tensor:
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float64) * 0.7 + k).reshape(shape).float()


def set_by_formula(name: str, tensor: Tensor) -> Tensor:
    """A weight from its name in that package."""
    if name.endswith("num_batches_tracked"):
        return tensor
    found = wave(tuple(tensor.shape), sum(map(ord, name)) % 97)
    if name.endswith("running_var"):
        return 1 + 0.3 * found
    if tensor.dim() == 4:
        return found * (2.0 / tensor[0].numel()) ** 0.5
    return 1 + 0.2 * found if name.endswith("weight") else 0.3 * found


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    state = LiteBackbone(nn.Identity(), 1).state_dict()
    named = {_their_name(name): set_by_formula(_their_name(name), tensor) for name, tensor in state.items()}
    torch.save(named | {"_fc.weight": torch.zeros(3, 3)}, tmp_path / "lite0.pth")
    return tmp_path / "lite0.pth"


def test_levels_are_those_of_the_package(weights: Path) -> None:
    backbone = LiteBackbone(nn.Identity(), 1).eval()
    backbone.load_imagenet(weights)
    with torch.no_grad():
        levels = backbone.levels(wave((2, 3, 64, 96), 5))
    assert list(levels) == ["0", "1", "2"]
    for level, (shape, mean, absolute, values) in zip(levels.values(), GOLDEN, strict=True):
        assert list(level.shape) == shape
        assert float(level.double().mean()) == pytest.approx(mean, rel=1e-4)
        assert float(level.double().abs().mean()) == pytest.approx(absolute, rel=1e-5)
        assert level.flatten()[:: level.numel() // 5][:5].tolist() == pytest.approx(values, rel=1e-4)


def test_a_detector_with_it_is_trained_saved_and_loaded(weights: Path, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"num_classes": 3, "image_size": 64, "backbone": "efficientnet-lite0"}
    model: Any = shapes_detector(**kwargs)
    model.backbone.load_imagenet(weights)
    target = {"boxes": torch.tensor([[3.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model.train()([torch.rand(3, 64, 64)], [target])
    assert len(losses) == 4 and all(torch.isfinite(loss) for loss in losses.values())
    batch, _ = model.transform([torch.full((3, 64, 64), 0.498)])
    assert float(batch.tensors.abs().max()) < 1e-6
    save_detector(model, tmp_path / "d.safetensors", kwargs)
    loaded, found = load_detector(tmp_path / "d.safetensors")
    assert found == kwargs and type(loaded.backbone) is LiteBackbone


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    backbone = LiteBackbone(nn.Identity(), 1)
    with pytest.raises(MissingFileError):
        backbone.load_imagenet(tmp_path / "none.pth")
    state = torch.load(weights, weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.startswith("_blocks.7")}, tmp_path / "less.pth")
    torch.save(state | {"_conv_stem.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pth")
    for name in ("less.pth", "other.pth"):
        with pytest.raises(FormatError, match=r"_blocks\.7|_conv_stem"):
            backbone.load_imagenet(tmp_path / name)
