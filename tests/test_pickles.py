"""Pickles of arrays are read, and nothing in one is ever run."""

import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from calib.errors import FormatError, MissingFileError
from calib.pickles import Kept, holds_kept, read_pickle, read_torch


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_tensors_and_plain_containers_come_back(protocol: int, tmp_path: Path) -> None:
    content: Any = OrderedDict(
        boxes=np.arange(8, dtype=np.float32).reshape(2, 4),
        score=np.float64(0.5),
        ids={1, 2},
        tensor=torch.arange(3),
        text=["ä", b"\xff\x00", (1, None, True)],
    )
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_pickle(tmp_path / "a.pkl", "results")
    assert np.array_equal(found["boxes"], content["boxes"]) and found["boxes"].dtype == np.float32
    assert torch.equal(found["tensor"], content["tensor"])
    assert {k: found[k] for k in ("score", "ids", "text")} == {k: content[k] for k in ("score", "ids", "text")}


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_what_a_pickle_names_is_not_run(tmp_path: Path) -> None:
    for k, content in enumerate([Evil(tmp_path / "ran"), [np.array([Evil(tmp_path / "ran")], object)]]):
        (tmp_path / f"{k}.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(FormatError, match="cannot be read: it names") as e:
            read_pickle(tmp_path / f"{k}.pkl", "results")
        assert "without running" in e.value.hint
    assert not (tmp_path / "ran").exists()


def test_damaged_pickles_are_named(tmp_path: Path) -> None:
    whole = pickle.dumps({"a": np.zeros(9)})
    for content in (b"", whole[:20], whole[:-5], b"not a pickle"):
        (tmp_path / "d.pkl").write_bytes(content)
        with pytest.raises(FormatError, match=r"weights .*d\.pkl cannot be read"):
            read_pickle(tmp_path / "d.pkl", "weights")
    with pytest.raises(MissingFileError):
        read_pickle(tmp_path / "absent.pkl", "weights")


class HistoryBuffer:
    """mmengine's, as pickles see it: arrays, and functions of its class by name."""

    def __init__(self) -> None:
        self._log_history = np.arange(3.0)
        self.methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> float:
        return 0.0


def test_a_checkpoint_of_a_training_is_read_without_mmengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mmengine.logging.history_buffer"
    module = ModuleType(name)
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for part in ("mmengine", "mmengine.logging", name):
            patch.setitem(sys.modules, part, module)
        patch.setattr(HistoryBuffer, "__module__", name)
        patch.setattr(HistoryBuffer.mean, "__module__", name)
        hub = {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {"lr": np.float64(0.5)}}
        state = {"state_dict": {"a": torch.ones(2)}, "meta": {"seed": np.int64(3), "ids": np.arange(2)}}
        torch.save(state | {"message_hub": hub}, tmp_path / "epoch_1.pth")
    found = read_torch(tmp_path / "epoch_1.pth", "checkpoint", keep=True)
    assert set(found) == {"state_dict", "meta", "message_hub"} and found["meta"]["seed"] == 3
    assert torch.equal(found["state_dict"]["a"], torch.ones(2)) and found["meta"]["ids"].tolist() == [0, 1]
    assert found["message_hub"]["runtime_info"] == {"lr": 0.5} and holds_kept(found["message_hub"])


def test_what_a_file_of_torch_names_is_not_run(tmp_path: Path) -> None:
    for k, content in enumerate([Evil(tmp_path / "ran"), Getting()]):
        for legacy in (False, True):
            torch.save([content, 3], tmp_path / f"{k}.pth", _use_new_zipfile_serialization=not legacy)
            with pytest.raises(FormatError, match="cannot be read: it names"):
                read_torch(tmp_path / f"{k}.pth", "results")
            found = read_torch(tmp_path / f"{k}.pth", "checkpoint", keep=True)
            assert isinstance(found[0], Kept) and found[1] == 3
    assert not (tmp_path / "ran").exists()


def test_damaged_files_of_torch_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(9)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for content in (b"", b"PK", b"no", whole[:100], whole[:-30]):
        (tmp_path / "d.pth").write_bytes(content)
        with pytest.raises(FormatError, match=r"weights .*d\.pth cannot be read") as e:
            read_torch(tmp_path / "d.pth", "weights")
        assert "\n" not in str(e.value) and "weights_only" not in str(e.value)
    with pytest.raises(MissingFileError):
        read_torch(tmp_path / "absent.pth", "weights")


class Getting:
    def __reduce__(self) -> Any:
        return (getattr, (OrderedDict, "fromkeys"))
