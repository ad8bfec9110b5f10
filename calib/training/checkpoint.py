"""What an interrupted training leaves beside its head, so that the same request goes on from there."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from calib.files import replacing, write_json
from calib.layout import STATE
from calib.training.optimizer import Updater


class Checkpoint:
    """What an interrupted training needs to go on; kept beside the head, refused when anything differs."""

    def __init__(self, folder: Path | None, request: dict[str, object], losses: list[tuple[int, float]]) -> None:
        self._folder, self._losses = folder, losses
        self._request = json.loads(json.dumps(request))

    def resume(self, module: nn.Module, updater: Updater) -> int:
        """Load the latest checkpoint of the same request; returns the step to go on with."""
        if self._folder is None or not (self._folder / STATE).exists():
            return 0
        with suppress(OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            state = json.loads((self._folder / STATE).read_text())
            if state["request"] == self._request:
                tensors = load_file(self._folder / f"{state['step']}.safetensors")
                module.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("m.")})
                updater.restore([tensors[f"v.{i}"] for i in range(sum(k.startswith("v.") for k in tensors))])
                self._losses.extend((int(s), float(v)) for s, v in state["losses"])
                return int(state["step"])
        return 0

    def save(self, module: nn.Module, updater: Updater, step: int) -> None:
        """Write tensors under a new name, then the JSON that points at them, then drop the older tensors."""
        if self._folder is None:
            return
        tensors = {f"m.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        tensors |= {f"v.{i}": v.cpu().contiguous() for i, v in enumerate(updater.momentum())}
        with replacing(self._folder / f"{step}.safetensors") as temporary:
            temporary.write_bytes(save(tensors))
        write_json(self._folder / STATE, {"step": step, "request": self._request, "losses": self._losses})
        for old in self._folder.glob("*.safetensors"):
            if old.stem != str(step):
                old.unlink()

    def remove(self) -> None:
        """The training is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
