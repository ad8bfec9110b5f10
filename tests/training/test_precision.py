"""precision=bf16: close to fp32, the hand-shaped step equal to autograd, and fp32 untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.linear import LinearClassifier
from calib.registry import METHODS
from calib.registry import load as load_target
from calib.settings import known_keys
from calib.training import train
from calib.training.batch import Batch, FusedLoss
from calib.training.bfloat16 import BFloat16Products
from calib.training.fused_softmax import mean_over_chunks, mean_over_rows

from ..toy import Toy

SETTINGS: dict[str, Any] = {"steps": 20, "warmup_steps": 0, "lr": 0.05}
LEARNED = [m for m in METHODS if "loop.precision" in known_keys(load_target(METHODS[m].target)())]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


def batch_of(n: int, size: int, outputs: int, spread: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(n)
    features = (spread * torch.randn(n, size, generator=generator)).relu()
    labels = torch.randint(outputs, (n,), generator=generator)
    chunk = torch.sort(torch.randint(4, (n,), generator=generator)).values
    return Batch(0, features, labels, chunk, 5, generator=generator)


def gradients(classifier: LinearClassifier) -> list[Tensor]:
    found = [p.grad.clone() for p in classifier.parameters() if p.grad is not None]
    classifier.zero_grad()
    return found


@pytest.mark.parametrize("reduction", [mean_over_rows, mean_over_chunks])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "size", "outputs"), [(200, 64, 30), (1, 8, 2), (37, 5, 120)])
def test_the_shaped_step_is_autograds(reduction: Any, bias: bool, n: int, size: int, outputs: int) -> None:
    """Same loss within 1e-5; gradients within 1 % of their norm, which is the rounding of single products, against the
    same products through autograd; 2 % against float32."""
    generator = torch.Generator().manual_seed(1)
    weight = 0.3 * torch.randn(outputs, size, generator=generator)
    classifier = LinearClassifier(weight, 0.5 * torch.randn(outputs, generator=generator) if bias else None)
    objective = reduction(classifier)
    assert isinstance(objective, FusedLoss)
    objective.gradients(batch_of(n + 3, size, outputs))  # memory of an earlier, larger step
    classifier.zero_grad()
    batch = batch_of(n, size, outputs)
    loss = objective.gradients(batch)
    shaped = gradients(classifier)
    with BFloat16Products():
        rounded = objective(batch)
    rounded.backward()
    torch.testing.assert_close(loss, rounded.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(shaped, gradients(classifier), strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()
    exact = objective(batch)
    exact.backward()
    torch.testing.assert_close(loss, exact.detach(), rtol=0.01, atol=0.01)
    for ours, theirs in zip(shaped, gradients(classifier), strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_an_impossible_label_has_a_finite_loss_and_its_gradient() -> None:
    classifier = LinearClassifier(torch.tensor([[200.0], [-200.0]]), torch.zeros(2))
    batch = Batch(0, torch.ones(1, 1), torch.tensor([1]), torch.tensor([0]), 1)
    objective = mean_over_rows(classifier)
    assert isinstance(objective, FusedLoss) and torch.isfinite(objective.gradients(batch))
    assert gradients(classifier)[1].tolist() == [1.0, -1.0]


def test_other_forms_of_classifier_are_left_to_autograd() -> None:
    cosine = LinearClassifier(torch.ones(3, 4), None, torch.ones(1))
    assert not isinstance(mean_over_rows(cosine), FusedLoss)


@pytest.mark.parametrize("method", LEARNED)
def test_every_learned_head_trains_close_to_float32(method: str, cache: Cache, tmp_path: Path) -> None:
    # AdamW makes steps of the learning rate's size, however small the gradient: at SGD's rate rounding is amplified.
    own = {"logit-adjustment": {"when": "loss"}, "pcb": {"hidden": 5}, "residual": {"lr": 1e-3}, "text": {"lr": 1e-3}}
    more = own.get(method, {})
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    exact = train(method, cache, tmp_path / "fp32", SETTINGS | more)
    rounded = train(method, cache, tmp_path / "bf16", SETTINGS | more | {"precision": "bf16"})
    assert rounded.info.settings["loop"]["precision"] == "bf16"
    assert (rounded.head.scores(x) - exact.head.scores(x)).abs().max() < 0.03
    assert {v.dtype for v in rounded.head.state_dict().values()} <= {torch.float32, torch.int64, torch.bool}


def test_the_products_are_rounded_and_nothing_else() -> None:
    x, w, b = torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)
    with BFloat16Products():
        z = torch.nn.functional.linear(x, w, b)
        one = torch.nn.functional.linear(x, w[:1])
    assert torch.equal(z, (x.bfloat16() @ w.bfloat16().t()).float() + b)
    assert torch.equal(one, torch.nn.functional.linear(x, w[:1]))


def test_a_precision_that_does_not_exist_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="precision is 'fp16': expected one of fp32, bf16"):
        train("crt", cache, tmp_path / "h", {"precision": "fp16"})
