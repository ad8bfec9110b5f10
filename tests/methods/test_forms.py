"""Every form of a method that its settings offer beside the default: kept on disk, resumed, permuted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.artifact import load
from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.detector import detector_head
from calib.methods.disalign import DisAlign
from calib.methods.natural import Natural
from calib.methods.tau_norm import TauNorm
from calib.settings import ImageBatches, with_overrides
from calib.training import train
from calib.training.context import FitContext
from calib.training.stages import fit_alone

from ..toy import Toy, permuted

STEPS = 4
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("tau-norm", {"select": "foreground"}),
    ("tau-norm", {"select": "tail"}),
    ("simcal", {"form": "mlp", "hidden": 5}),
    ("simcal", {"inference": "average"}),
    ("simcal", {"form": "mlp", "hidden": 5, "inference": "average"}),
    ("bags", {"edges": ()}),
    ("bags", {"edges": (5, 10, 50, 100, 500, 1000, 5000)}),
    ("disalign", {"parametrisation": "eq6"}),
    ("disalign", {"base": "cosine", "base_loop.steps": STEPS, "base_loop.checkpoint_every": 1}),
    ("crt", {"background_share": 0.0, "rows_per_step": 20}),
]
every_form = pytest.mark.parametrize(("method", "form"), FORMS, ids=[f"{m} {f}" for m, f in FORMS])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(40, Toy().feature_size, generator=torch.Generator().manual_seed(3))


def settings(method: str, form: dict[str, Any]) -> dict[str, Any]:
    loop = {"loop.steps": STEPS, "loop.lr": 0.1, "loop.warmup_steps": 0, "loop.checkpoint_every": 1}
    return form if method == "tau-norm" else loop | form


@every_form
def test_saved_and_loaded_it_gives_the_same_bits(
    method: str, form: dict[str, Any], cache: Cache, features: Tensor, tmp_path: Path
) -> None:
    head = train(method, cache, tmp_path / "h", settings(method, form)).head
    scores = head.scores(features)
    assert scores.shape == (40, 7) and bool((scores >= 0).all()) and bool((scores <= 1).all())
    assert not torch.allclose(scores, detector_head(cache).scores(features))
    assert torch.equal(load(tmp_path / "h").head.scores(features), scores)


class _Steps:
    """Notes every step of all loops; raises at the n-th."""

    def __init__(self, n: int) -> None:
        self.left, self.done = n, 0

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator["_Steps"]:
        yield self

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.done, self.left = self.done + n, self.left - n
        if self.left <= 0:
            raise KeyboardInterrupt


LEARNED = [(m, f) for m, f in FORMS if m != "tau-norm"]


@pytest.mark.parametrize(("method", "form"), LEARNED, ids=[f"{m} {f}" for m, f in LEARNED])
def test_interrupted_anywhere_and_resumed_it_is_the_same_head(
    method: str, form: dict[str, Any], cache: Cache, features: Tensor, tmp_path: Path
) -> None:
    chosen, count = settings(method, form), _Steps(10**6)
    whole = train(method, cache, tmp_path / "whole", chosen, progress=count.progress).head
    for at in range(1, count.done + 1):
        with pytest.raises(KeyboardInterrupt):
            train(method, cache, tmp_path / f"cut{at}", chosen, progress=_Steps(at).progress)
        resumed = train(method, cache, tmp_path / f"cut{at}", chosen).head
        assert torch.equal(resumed.scores(features), whole.scores(features)), at


def test_the_stopped_again_and_again_training_ends_too(cache: Cache, features: Tensor, tmp_path: Path) -> None:
    chosen = settings("natural", {})
    whole = train("natural", cache, tmp_path / "whole", chosen).head
    for _ in range(STEPS - 1):  # every attempt does one step, resumes the earlier ones, and stops in the next
        with pytest.raises(KeyboardInterrupt):
            train("natural", cache, tmp_path / "cut", chosen, progress=_ThirdAdvance().progress)
    resumed = train("natural", cache, tmp_path / "cut", chosen).head
    assert torch.equal(resumed.scores(features), whole.scores(features))


class _ThirdAdvance(_Steps):
    """Stops at the second step that this attempt does itself."""

    def __init__(self) -> None:
        super().__init__(0)

    def advance(self, n: int = 1, **metrics: float) -> None:
        if "loss" in metrics:
            return
        self.done += 1
        if self.done == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method",
    [Natural(images=ImageBatches(2, 2)), DisAlign(images=ImageBatches(2, 2)), TauNorm(select="tail")],
    ids=["natural", "disalign", "tau-norm"],
)
def test_another_order_of_classes_is_another_order_of_columns(method: Natural, cache: Cache, features: Tensor) -> None:
    """Also where training starts at the detector's own weights and draws images, not classes."""
    order = np.asarray([3, 0, 6, 1, 5, 2, 4])
    if not isinstance(method, TauNorm):
        method = with_overrides(method, {"loop.steps": 5, "loop.lr": 0.1, "loop.warmup_steps": 0})
    ours, theirs = (_fitted(method, c).scores(features) for c in (cache, permuted(cache, order)))
    torch.testing.assert_close(theirs, ours[:, order], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs, ours, atol=1e-3)


def _fitted(method: Natural, cache: Cache) -> Head:
    return fit_alone(method, cache, FitContext()).eval()
