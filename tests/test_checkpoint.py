"""State dicts are found in what wrappers and training scripts put around them, and are written back as they lay."""

import argparse
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calib.checkpoint import Checkpoint
from calib.errors import FormatError
from calib.extract.weights import load_weights


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {k: torch.rand_like(v.float()).to(v) for k, v in model().state_dict().items()}


class AttributeDict(dict[str, Any]):
    """As Lightning keeps hyper-parameters."""


class Trainer:
    """Something with a state of its own."""

    def __init__(self) -> None:
        self.anything = [1, 2]


def under(prefix: str, state: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()} | more


ZERO = torch.zeros(2)
WRAPPED: dict[str, Any] = {
    "plain": lambda s: s,
    "data parallel": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled data parallel": lambda s: under("module._orig_mod.", s),
    "a part of it parallel": lambda s: {k.replace("0.", "0.module."): v for k, v in s.items()},
    "tutorial": lambda s: {
        "epoch": 3, "model_state_dict": s, "optimizer_state_dict": {"state": {0: ZERO}}, "loss": ZERO,
    },
    "reference": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, out=Path("x")), "best": np.float64(0.5)},
    "lightning": lambda s: {
        "state_dict": under("model.", s, **{"criterion.weight": ZERO}), "hyper_parameters": AttributeDict(lr=0.1),
    },
    "averaged": lambda s: {"ema": {"module": s, "updates": 7}},
    "averaged model": lambda s: {"model_ema": under("module.", s, n_averaged=torch.tensor(3))},
    "both": lambda s: {"ema": {k: v + 1 for k, v in s.items()}, "model": s},
    "teacher and student": lambda s: {
        "state_dict": under("student.", s) | under("teacher.", {k: v + 1 for k, v in s.items()}),
    },
    "deep": lambda s: {"checkpoint": 1, "state_dict": {"model": under("module.model.", s)}},
    "trainer": lambda s: {"model": s, "trainer": Trainer(), "sizes": torch.Size([2]), "half": torch.float16},
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_found(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(WRAPPED[form](state), tmp_path / "w.pth")
    fresh = model()
    load_weights(fresh, tmp_path / "w.pth")
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True])
def test_the_old_format_of_torch_is_read_alike(legacy: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    content = {"model": state, "args": argparse.Namespace(a=1)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    load_weights(model(), tmp_path / "w.pth")


def test_arrays_of_any_byte_order_and_safetensors_with_a_prefix(state: dict[str, Tensor], tmp_path: Path) -> None:
    arrays = {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in state.items()}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    save_file(under("module.", state), tmp_path / "w.safetensors")
    for name in ("w.pkl", "w.safetensors"):
        fresh = model()
        load_weights(fresh, tmp_path / name)
        assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "another model": (lambda s: {"model": {"a.weight": ZERO}}, ("under model", "a.weight", "Missing key")),
    "another size": (lambda s: under("module.", s | {"2.bias": torch.zeros(9)}), ("size mismatch", "module.*")),
    "a whole module": (lambda s: {"model": Trainer(), "epoch": 3}, ("Trainer, which only code can make", "epoch")),
    "no weights": (lambda s: {"epoch": 3, "lr": 0.1}, ("epoch (int)", "lr (float)")),
    "a list": (lambda s: [1, 2], ("list",)),
    "two of them": (lambda s: under("a.", s) | under("b.", s), ("a., b.",)),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_does_not_fit_is_shown(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    content, words = REFUSED[form]
    torch.save(content(state), tmp_path / "w.pth")
    with pytest.raises(FormatError) as error:
        load_weights(model(), tmp_path / "w.pth")
    assert all(word in str(error.value) for word in ("w.pth", *words)), str(error.value)
    assert "\n" not in str(error.value) and error.value.hint


def test_a_program_is_no_state_dict(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:  # what tells one from a state dict
        archive.writestr("w/constants.pkl", pickle.dumps(()))
    with pytest.raises(FormatError, match="TorchScript"):
        Checkpoint.read(tmp_path / "w.pth")


@pytest.mark.parametrize("form", [f for f in WRAPPED if f not in ("lightning", "trainer")])
def test_it_is_written_as_it_lay(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(WRAPPED[form](state), tmp_path / "w.pth")
    checkpoint = Checkpoint.read(tmp_path / "w.pth")
    name = next(n for n in checkpoint.state if n.endswith("2.bias"))
    checkpoint.replace(name, torch.tensor([8.0, 9.0]))
    checkpoint.write(tmp_path / "again.pth")
    assert not checkpoint.unwritten() and checkpoint.copies == (("ema",) if form == "both" else ())
    old, new = Checkpoint.read(tmp_path / "w.pth"), Checkpoint.read(tmp_path / "again.pth")
    assert new.entry == old.entry and list(new.state) == list(old.state)
    assert new.state[name].tolist() == [8.0, 9.0]
    assert all(torch.equal(new.state[k], v) for k, v in old.state.items() if k != name)
    if form == "reference":
        assert new.document["args"].lr == 0.1 and new.document["best"] == 0.5


def test_what_only_code_can_make_is_left_out_and_told(state: dict[str, Tensor], tmp_path: Path) -> None:
    for form, name in (("lightning", "hyper_parameters"), ("trainer", "trainer")):
        torch.save(WRAPPED[form](state), tmp_path / "w.pth")
        checkpoint = Checkpoint.read(tmp_path / "w.pth")
        assert checkpoint.unwritten() == [name]
        checkpoint.write(tmp_path / "again.pth")
        again = Checkpoint.read(tmp_path / "again.pth")
        assert set(again.document) == set(checkpoint.document) - {name} and not again.unwritten()


def test_classes_that_are_not_installed_do_not_matter(state: dict[str, Tensor], tmp_path: Path) -> None:
    module = types.ModuleType("gone_package")
    module.Args = type("Args", (), {"__module__": "gone_package"})  # type: ignore[attr-defined]
    sys.modules["gone_package"] = module
    torch.save({"model": state, "args": module.Args()}, tmp_path / "w.pth")
    del sys.modules["gone_package"]
    load_weights(model(), tmp_path / "w.pth")
