"""Adapter for detectors of Ultralytics YOLO, unmodified; the package is AGPL-3.0 and is imported in this file only.

Everything goes through its own ``predict``: hooks on the detection head note the inputs of the convolutions that
classify, one per level, and the boxes of all places. Detections are those of its own suppression with every class of a
box, as ``yolo val`` counts them (``yolo predict`` shows the best class of a box). Boxes lie in the resized picture
without the grey border around it; they are cut at its edges after suppression. Letters: M places of all levels, C
classes.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from calib.boxes import Boxes, rescale
from calib.checkpoint import Checkpoint
from calib.errors import FormatError, InputError, MissingExtraError, UnsupportedError
from calib.extract.adapter import ClassRule, Image, Own
from calib.extract.dense import PER_LEVEL, SAMPLING, DenseAdapter, Level, layers_of
from calib.extract.modules import Recorded, recording, replaced
from calib.extract.staging import array
from calib.extract.weights import factory_arguments
from calib.files import require
from calib.heads.blocks import Blocks

HINT = '--detector-args \'{"imgsz": 640, "conf": 0.001, "iou": 0.7, "max_det": 300}\''
HEADS = ("Detect", "v10Detect")
# No downloads and installations, and only classes of its own out of a checkpoint, unless the user says otherwise.
ENVIRONMENT = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "ULTRALYTICS_SAFE_LOAD": "true"}


@dataclass(frozen=True)
class Predict:
    """Arguments of ``predict``; defaults are those of ``yolo val``. ``nms`` false: the head that needs no suppression
    (YOLOv10, YOLO26)."""

    imgsz: int = 640
    conf: float = 0.001
    iou: float = 0.7
    max_det: int = 300
    nms: bool | None = None

    @classmethod
    def of(cls, arguments: str, imgsz: int) -> Self:
        """From a JSON object; ``imgsz`` where it has none.

        Raises:
            InputError: other arguments, or other values.
        """
        given = {"imgsz": imgsz} | factory_arguments(arguments, HINT)
        kinds = {"imgsz": (int,), "conf": (int, float), "iou": (int, float), "max_det": (int,), "nms": (bool,)}
        wrong = [k for k, v in given.items() if k not in kinds or type(v) not in kinds[k]]
        if wrong or not (given["imgsz"] >= 32 and 0 <= given.get("conf", 0) < 1 and given.get("max_det", 1) >= 1):
            raise InputError(f"detector arguments are {json.dumps(given)}: expected {', '.join(kinds)}", hint=HINT)
        return cls(**given)


class YoloAdapter(DenseAdapter):
    """A detector in eval mode.

    Raises:
        UnsupportedError: its task is another one, or its head is not one of HEADS with plain convolutions.
    """

    def __init__(self, yolo: Any, source: str, device: torch.device, predict: Predict) -> None:
        self.yolo, self.model, self.device, self.settings = yolo, yolo.model, device, predict
        if yolo.task != "detect" or type(self.model.model[-1]).__name__ not in HEADS:
            raise UnsupportedError(
                f"{source} is a {type(self.model.model[-1]).__name__} for the task {yolo.task}: expected the head "
                f"{' or '.join(HEADS)}, for the task detect",
                hint="segmentation, poses, rotated boxes and prompts do not fit; others as arrays: docs/raw.md",
            )
        self._predict([np.zeros((64, 64, 3), np.uint8)])
        self._head: Any = yolo.predictor.model.model.model[-1]
        self._ends = bool(self._head.end2end)
        branch = "one2one_cv3" if self._ends else "cv3"
        place = f"model.{len(self.model.model) - 1}.{branch}"
        branches = [*getattr(self._head, branch)]
        self._convs = [part[-1] for part in branches]
        named = [(f"{place}.{k}.{len(part) - 1}", part[-1]) for k, part in enumerate(branches)]
        layers = layers_of(named, [1] * len(named))
        self.blocks = Blocks.of(layers, len(layers[0].bias), range(len(layers[0].bias)))
        self.most = predict.max_det if self._ends else 2**31
        self.sampling = replace(SAMPLING, one_to_one=self._ends)
        names = tuple(str(name) for _, name in sorted(self.model.names.items()))
        self.classes = ClassRule("names", names, hint="train with a data.yaml whose names are those of the categories")
        self._describe(
            source,
            "sigmoid",
            score_threshold=float(predict.conf),
            nms_iou=1.0 if self._ends else float(predict.iou),
            max_detections=predict.max_det,
            clips_last=True,
        )

    def accepts(self, height: int, width: int) -> bool:
        """Every picture: no side is resized to nothing."""
        return True

    def _most_candidates(self) -> int:
        if self._ends:
            return len(self._convs) * max(PER_LEVEL, self.most)
        return sum(int(np.ceil(self.settings.imgsz / float(s))) ** 2 for s in self._head.stride)

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """By the package's own suppression (see ``Adapter.detections``), before boxes are cut at the edges."""
        suppression = import_module("ultralytics.utils.nms").non_max_suppression
        with _hooked(self._head, [], is_last=False) as seen:
            self._predict([image])
        s, output = self.settings, seen["output"]
        options = {"multi_label": True, "max_det": s.max_det, "end2end": self._ends}
        # In float64: it tells classes apart by 7,680 pixels each, which in float32 leaves little of a coordinate.
        (found,) = suppression(output.double(), s.conf, s.iou, max_time_img=60.0, max_nms=10**9, **options)
        net, shift = self._frame(seen["shape"], image)
        boxes = rescale(array(found[:, :4]) - shift, net, image.shape[:2])
        return Own(found[:, 5].cpu().numpy().astype(np.int64), array(found[:, 4]), boxes)

    @torch.no_grad()
    def _run(self, images: list[Image]) -> list[tuple[tuple[int, int], list[Level]]]:
        with _hooked(self._head, self._convs) as seen:
            self._predict(images)
        boxes = seen["places"][:, :4].transpose(1, 2)
        if not self._ends:  # centre and size
            centre, half = boxes[..., :2], boxes[..., 2:] / 2
            boxes = torch.cat([centre - half, centre + half], dim=-1)
        counts = [given.shape[2] * given.shape[3] for given, _ in seen["calls"]]
        out = []
        for i, image in enumerate(images):
            net, shift = self._frame(seen["shape"], image)
            own = (boxes[i] - torch.from_numpy(shift).to(boxes)).split(counts)
            parts = zip(self._convs, seen["calls"], own, strict=True)
            levels = [Level(c, k, given[i], z[i].flatten(1).T, b) for k, (c, (given, z), b) in enumerate(parts)]
            out.append((net, levels))
        return out

    def _predict(self, images: list[Image]) -> Any:
        """The package's own; it takes BGR."""
        s = self.settings
        options: dict[str, Any] = {"imgsz": s.imgsz, "conf": s.conf, "iou": s.iou, "max_det": s.max_det, "nms": s.nms}
        device = "cpu" if self.device.type == "cpu" else str(self.device.index or 0)
        pictures = [np.ascontiguousarray(i[..., ::-1]) for i in images]
        return self.yolo.predict(pictures, device=device, verbose=False, save=False, **options)

    def _frame(self, shape: tuple[int, int], image: Image) -> tuple[tuple[int, int], Boxes]:
        """Height and width of the resized picture inside the network's input of ``shape``, and where it begins there:
        [4] x, y, x, y."""
        gain = min(n / own for n, own in zip(shape, image.shape[:2], strict=True))
        height, width = (max(round(own * gain), 1) for own in image.shape[:2])
        y, x = round((shape[0] - height) / 2 - 0.1), round((shape[1] - width) / 2 - 0.1)
        return (height, width), np.asarray([x, y, x, y], np.float32)


@contextmanager
def _hooked(head: Any, convs: list[nn.Module], *, is_last: bool = True) -> Iterator[dict[str, Any]]:
    """What the head computes in one pass: ``shape`` of the network's input, ``calls`` of ``convs`` (input, output),
    ``places`` [B, 4 + C, M]; the pass ends there, or (not ``is_last``) ``output`` of the head, too. Undone on exit."""
    seen: dict[str, Any] = {"calls": []}
    original = head._inference

    def enter(module: Any, args: tuple[Any, ...]) -> None:
        stride = float(head.stride[0])
        seen["shape"] = tuple(round(n * stride) for n in args[0][0].shape[2:])

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["calls"].append((args[0], output))

    def decode(*args: Any) -> Tensor:
        seen["places"] = original(*args)
        if is_last:
            raise Recorded
        places: Tensor = seen["places"]
        return places

    def leave(module: Any, args: Any, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    handles = [conv.register_forward_hook(note) for conv in convs]
    handles += [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
    with replaced(head, _inference=decode), recording(*handles):
        yield seen


def open_detector(spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = "") -> YoloAdapter:
    """Open the checkpoint file ``spec`` (best.pt); nothing is downloaded, and only objects of classes that the package
    knows are made of it (its own ``ULTRALYTICS_SAFE_LOAD``).

    Args:
        spec: the file.
        device: where it runs.
        weights: must be None; the file has them.
        arguments: JSON object, the fields of ``Predict``.

    Raises:
        MissingExtraError: ultralytics is not installed. MissingFileError, FormatError: no such file, or no checkpoint.
        InputError: arguments that do not fit. UnsupportedError: another kind of model.
    """
    library = _library()
    if weights is not None:
        raise InputError("a checkpoint of ultralytics has its own weights", hint="leave out --weights")
    path = require(Path(spec), "ultralytics checkpoint", hint="--detector ultralytics:FILE.pt; nothing is downloaded")
    try:
        yolo = library.YOLO(path)
        trained_at = yolo.overrides.get("imgsz", 640)
    except Exception as e:  # whatever the library raises for other files
        raise FormatError(
            f"ultralytics checkpoint {path} cannot be read: {e}", hint="is it whole? copy it again"
        ) from e
    predict = Predict.of(arguments, trained_at if type(trained_at) is int else 640)
    return YoloAdapter(yolo, f"ultralytics:{path.name}", device, predict)


def _library() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # read when it is imported
    try:
        return import_module("ultralytics")
    except ImportError:
        raise MissingExtraError("ultralytics", "", hint="pip install ultralytics (AGPL-3.0: docs/dense.md)") from None


class YoloCheckpoint(Checkpoint):
    """A file whose model is an object; it is read and written by the package's own classes, in float32."""

    @classmethod
    def read(cls, path: Path, suffix: str = "", what: str = "checkpoint") -> Self:
        """As ``Checkpoint.read``.

        Raises:
            MissingExtraError, MissingFileError, FormatError: as ``open_detector``.
        """
        _library()
        require(path, what)
        try:
            with TemporaryDirectory() as folder:  # the package asks for the ending
                named = Path(folder) / "checkpoint.pt"
                shutil.copyfile(path, named)
                document, _ = import_module("ultralytics.nn.tasks").torch_safe_load(named, safe_only=True)
            entry = "ema" if document.get("ema") is not None else "model"
            state = document[entry].float().state_dict()
        except Exception as e:  # whatever the library raises for other files
            raise FormatError(f"{what} {path} cannot be read: {e}", hint="a checkpoint of ultralytics") from e
        others = tuple(n for n in ("model", "ema") if n != entry and document.get(n) is not None)
        return cls(path, document, state, entry, others)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Into the model itself."""
        self.state[name].copy_(tensor)

    def unwritten(self) -> list[str]:
        """None."""
        return []

    def write(self, path: Path) -> None:
        """As the package writes it."""
        torch.save(self.document, path)
