"""A fitted head of every kind, with a cache to compare its exports on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest

from calib.artifact import Artifact, load, save
from calib.cache import Cache
from calib.registry import METHODS
from calib.registry import load as load_target
from calib.settings import known_keys
from calib.training import train

from ..score.test_score import DECIDED, KINDS, decided
from ..toy import Toy

ALL_KINDS: dict[str, tuple[str, dict[str, Any]]] = KINDS | {
    "box-head": ("simcal", {"form": "2fc_rand", "hidden": 16}),
    "iterative-map": ("pcb", {"form": "map", "hidden": 16, "mlp_layers": 3, "layer_norm": "both"}),
    "sigmoid-product": ("fracal", {}),
    DECIDED: ("crt", {}),  # and another
}


@dataclass(frozen=True)
class Fitted:
    """A head folder and a cache of its detector."""

    folder: Path
    cache: Path

    @property
    def artifact(self) -> Artifact:
        return load(self.folder)


Fit = Callable[..., Fitted]


def quick(method: str) -> dict[str, Any]:
    """Enough steps for scores that differ, where the method takes any."""
    wanted = {"steps": 30, "warmup_steps": 0, "lr": 0.05}
    keys = known_keys(load_target(METHODS[method].target)())
    return {key: wanted[key.rpartition(".")[2]] for key in keys if key.rpartition(".")[2] in wanted}


@pytest.fixture(scope="session")
def sigmoid_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy(activation="sigmoid").write(tmp_path_factory.mktemp("sigmoid") / "cache")


@pytest.fixture(scope="session")
def map_caches(make_cache: Callable[..., Cache]) -> Callable[[], tuple[Cache, Cache]]:
    """Train and val with RoI maps, made when they are first asked for."""
    return once(
        lambda: (
            make_cache("train", mode="train", roi_maps=True),
            make_cache("val", mode="test", roi_maps=True, dtype="float32"),
        )
    )


@pytest.fixture(scope="session")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """``fit(method, train_cache, cache, **settings)``: a head, trained once per session."""
    found: dict[str, Fitted] = {}

    def run(method: str, train_cache: Cache, cache: Cache, **settings: Any) -> Fitted:
        key = f"{method} {train_cache.path} {settings}"
        if key not in found:
            folder = tmp_path_factory.mktemp("models") / method / "1"
            train(method, train_cache, folder, quick(method) | settings)
            found[key] = Fitted(folder, cache.path)
        return found[key]

    return run


@pytest.fixture(scope="session")
def of_kind(
    fit: Fit,
    train_cache: Cache,
    exact_val_cache: Cache,
    map_caches: Callable[[], tuple[Cache, Cache]],
    sigmoid_cache: Cache,
) -> Callable[[str], Fitted]:
    """``of_kind(kind)``: one of ``ALL_KINDS``."""

    def make(kind: str) -> Fitted:
        method, settings = ALL_KINDS[kind]
        if kind == "sigmoid-product":
            return fit(method, sigmoid_cache, sigmoid_cache, **settings)
        if kind == DECIDED:
            one, other = (fit(m, train_cache, exact_val_cache) for m in ("crt", "bags"))
            folder = one.folder.with_name("decided")
            if not folder.exists():
                save(folder, decided(one.artifact, other.artifact))
            return Fitted(folder, one.cache)
        caches = map_caches() if kind in ("box-head", "iterative-map") else (train_cache, exact_val_cache)
        return fit(method, *caches, **settings)

    return make
