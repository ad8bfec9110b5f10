"""Extraction on CUDA: the rows of the CPU, copied without waiting. ``python -m pytest -m gpu``."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.staging import Staged, to_device
from calib.extract.torchvision import TorchvisionAdapter

from .conftest import tiny_detector

pytest.importorskip("torchvision")

BOXES = np.asarray([[2, 3, 30, 35], [10, 4, 50, 30], [0, 0, 60, 40]], np.float32)


@pytest.fixture
def exact_products() -> Any:
    """TensorFloat-32 keeps 10 bits; these tests compare float32."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    cudnn.allow_tf32 = False
    yield
    cudnn.allow_tf32 = before


def features(adapter: TorchvisionAdapter, picture: Any) -> Any:
    return adapter.rois([picture], lambda *_: (BOXES, np.ones(3, np.float32)))[0]


def test_staging_on_the_cpu_copies_nothing_and_keeps_the_numbers(draw: Callable[..., Any]) -> None:
    picture = draw(6, 5)
    tensor = to_device(picture, torch.device("cpu"))
    assert np.array_equal(tensor.numpy(), np.transpose(picture, (2, 0, 1)).astype(np.float32) / 255)
    x = torch.arange(12.0).reshape(3, 4)
    arrays = Staged({"plain": x, "turned": x.T, "half": x.bfloat16()}).arrays()
    assert arrays["plain"].ctypes.data == x.data_ptr()
    assert np.array_equal(arrays["turned"], x.numpy().T) and arrays["turned"].flags.c_contiguous
    assert arrays["half"].dtype == np.float32 and np.array_equal(arrays["half"], x.numpy())


@pytest.mark.gpu
def test_staged_copies_arrive_whole_while_the_device_works_on() -> None:
    x = torch.randn(4096, 1024, device="cuda")
    waiting = []
    for _ in range(8):
        x = x @ torch.eye(1024, device="cuda") + 1
        waiting.append((Staged({"x": x}), x.clone()))
    for staged, expected in waiting:
        assert np.array_equal(staged.arrays()["x"], expected.cpu().numpy())


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.03), ("fp16", 0.01)])
def test_rows_of_the_same_boxes_are_those_of_the_cpu(
    exact_products: None, draw: Callable[..., Any], precision: str, tolerance: float
) -> None:
    cpu = TorchvisionAdapter(tiny_detector(), "tiny", torch.device("cpu"))
    gpu = TorchvisionAdapter(tiny_detector(), "tiny", torch.device("cuda"))
    gpu.precision = precision
    a, b = features(cpu, draw(40, 60)), features(gpu, draw(40, 60))
    assert np.abs(a.features - b.features).max() <= tolerance * np.abs(a.features).max()
    assert np.abs(a.logits - b.logits).max() <= tolerance * max(1.0, np.abs(a.logits).max())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_cache_made_on_the_gpu_is_sound_and_the_same_each_time(
    document: Callable[..., Any], read: Callable[..., Dataset], tmp_path: Path, mode: str
) -> None:
    dataset = read(document([(40, 60)] * 5, [(1, 10, 5, 5, 20, 20)]))
    adapter = TorchvisionAdapter(tiny_detector(), "tiny", torch.device("cuda"))
    settings = replace(Extraction(mode, "float32"), images_per_shard=2, batch_size=2)
    caches = []
    for name in ("one", "two"):
        extract(adapter, dataset, tmp_path / "images", tmp_path / name, settings)
        caches.append(Cache(tmp_path / name))
    assert caches[0].n_rows == caches[1].n_rows > 0
    x, z = caches[0].features.read(0, caches[0].n_rows), caches[0].logits
    assert z is not None and np.abs(caches[0].classifier.logits(x) - z.read(0, len(x))).max() < 1e-2
    assert np.allclose(x, caches[1].features.read(0, len(x)), atol=1e-4)
