"""Adapter for decoder detectors of Hugging Face transformers (DETR and its kin), unmodified: queries are the RoIs.

The last linear layer of the last decoder layer is found by what it computes: it is the one whose output the model
returns as ``logits``. A hook notes its input. There is no non-maximum suppression (nms_iou 1), and queries cannot be
exchanged for ground truth: training rows are the queries themselves, each object given to one of them, as these
detectors train. Letters: N queries, D feature size, C foreground classes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import CalibError, FormatError, InputError, MissingExtraError, UnknownNameError, UnsupportedError
from calib.extract.adapter import ClassRule, Image, Immediate, Own, Replace, RoIs, Sampling
from calib.files import require

# Softmax detectors have one output more, "no object", and it is last; sigmoid detectors have no such column.
ACTIVATIONS = {
    "detr": "softmax",
    "table-transformer": "softmax",
    "conditional_detr": "sigmoid",
    "d_fine": "sigmoid",
    "dab-detr": "sigmoid",
    "deformable_detr": "sigmoid",
    "rt_detr": "sigmoid",
    "rt_detr_v2": "sigmoid",
}
_ALL_QUERIES = ("rt_detr", "rt_detr_v2", "d_fine")  # as many detections as queries; other sigmoid detectors 100
_ARGUMENTS = "--detector-args '{\"labels\": [1, 2, 3, 5]}'"


class TransformersAdapter(Immediate):
    """Records the queries of a detector in eval mode.

    ``labels``: the outputs that stand for the categories, in ascending category id. Where it is None all of them do, by
    the names of ``id2label`` if all of these are categories, else in ascending category id too. Outputs that are left
    out are no rows of the classifier. Beside a softmax they must then be such as are never found (COCO's numbers
    without a class): a column for the rest of the softmax would not be linear in the features, which heads need.

    Raises:
        UnsupportedError: another kind of model. InputError: ``labels`` are no outputs.
    """

    takes_proposals = False

    def __init__(
        self, model: Any, processor: Any, source: str, device: torch.device, labels: list[int] | None = None
    ) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in ACTIVATIONS:
            raise UnsupportedError(
                f"{kind} is no detector whose decoder queries end in one linear classifier",
                hint=f"known: {', '.join(ACTIVATIONS)}; others can come as arrays: docs/raw.md",
            )
        self.model, self.processor, self.device = model.eval().to(device), processor, device
        self._activation = ACTIVATIONS[kind]
        seen = self._run([np.zeros((64, 64, 3), np.uint8)])
        self._layer = seen.layer
        has_background = self._activation == "softmax"
        own = self._layer.out_features - has_background
        if labels is not None and not (len(set(labels)) == len(labels) > 0 and all(0 <= k < own for k in labels)):
            raise InputError(f"labels must be different outputs from 0 to {own - 1}", hint=_ARGUMENTS)
        self._columns = [*(range(own) if labels is None else labels), *([own] if has_background else [])]
        named = tuple(str(name) for _, name in sorted(model.config.id2label.items()))
        has_names = labels is None and len(named) == own and not any(n.startswith("LABEL_") for n in named)
        self.classes = ClassRule("names", named, hint=_ARGUMENTS) if has_names else ClassRule()
        queries = seen.logits.shape[1]
        self.sampling = Sampling(rows_per_image=queries, foreground_share=1.0, one_to_one=True)
        self.detector = Detector(
            source=source,
            digest=self.classifier().digest(),
            num_classes=len(self._columns) - has_background,
            feature_size=self._layer.in_features,
            activation=self._activation,
            nms_space="original",
            score_threshold=0.0,
            nms_iou=1.0,
            max_detections=queries if has_background or kind in _ALL_QUERIES else 100,
            settings={"model": kind, "size": _plain(processor.size), "labels": labels},
        )

    def classifier(self, *, with_hidden: bool = False) -> Classifier:
        """The last linear layer (see ``Adapter.classifier``)."""
        if with_hidden:
            self.map_shape()
        bias = None if self._layer.bias is None else _array(self._layer.bias)[self._columns]
        return Classifier(_array(self._layer.weight)[self._columns], bias)

    def accepts(self, height: int, width: int) -> bool:
        """No side may be resized to nothing; detectors with one input size take every picture."""
        size = dict(self.processor.size)
        short, long = min(height, width), max(height, width)
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            return True
        return bool(short * min(size["shortest_edge"] / short, size["longest_edge"] / long) >= 1)

    def map_shape(self) -> tuple[int, int, int]:
        """
        Raises:
            UnsupportedError: always; queries have no RoI maps.
        """
        raise UnsupportedError("the queries of a decoder have no RoI maps", hint="extract without --roi-maps")

    def most_rows(self, mode: str) -> int:
        """The number of queries."""
        return self.sampling.rows_per_image

    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """The queries of every image, with the boxes that the detector gives them, in original pixels."""
        if replace is not None or maps:
            raise UnsupportedError("queries of a decoder cannot be exchanged, and have no maps")
        seen = self._run(images)
        out = []
        for i, image in enumerate(images):
            logits = _array(seen.logits[i])[:, self._columns]
            height, width = image.shape[:2]
            # In torch and in this order, as the library's own post-processing: float32 rounds alike.
            centre, half = seen.boxes[i, :, :2], 0.5 * seen.boxes[i, :, 2:]
            corners = torch.cat([centre - half, centre + half], dim=1)
            boxes = _array(corners * torch.tensor([width, height, width, height], device=corners.device))
            p = torch.from_numpy(logits)
            objectness = (
                p.softmax(1)[:, :-1].sum(1).clamp(0, 1) if self._activation == "softmax" else p.sigmoid().amax(1)
            )
            out.append(RoIs(boxes, objectness.numpy(), _array(seen.features[i]), logits, boxes, (height, width)))
        return out

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """Those of the library's own post-processing; with a softmax every query gives its best class."""
        outputs = self.model(**self._inputs([image]))
        (found,) = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.shape[:2]])
        score, label = _array(found["scores"]), found["labels"].cpu().numpy()
        place = np.full(outputs.logits.shape[2], -1)
        place[self._columns[: self.detector.num_classes]] = np.arange(self.detector.num_classes)
        chosen = place[label] >= 0
        row, remark = None, ""
        if self._activation == "softmax":
            p = outputs.logits[0].softmax(1)
            row = np.flatnonzero(_array(p[:, :-1].amax(1)) > 0)[chosen]
            others = float((1 - p[:, self._columns].sum(1)).max())
            if p.shape[1] > len(self._columns):
                remark = (
                    f"the outputs that labels leaves out take up to {others:.1%} of a query's softmax, and a cache has "
                    "no column for them: name all classes of the detector in labels and in the annotation file, those "
                    "without objects, too"
                )
        cut = 0.0 if chosen.all() else float(score.min())  # the others took places
        return Own(place[label][chosen], score[chosen], _array(found["boxes"])[chosen], row, cut, remark)

    def _inputs(self, images: list[Image]) -> dict[str, Tensor]:
        inputs = self.processor(images=images, return_tensors="pt", input_data_format="channels_last").to(self.device)
        return {k: inputs[k] for k in ("pixel_values", "pixel_mask") if k in inputs}

    @torch.no_grad()
    def _run(self, images: list[Image]) -> "_Seen":
        with _recording(self.model) as calls:
            found = self.model(**self._inputs(images))
        for layer, given, output in reversed(calls):
            if torch.equal(output, found.logits):
                return _Seen(layer, given, found.logits, found.pred_boxes)
        raise UnsupportedError(f"the logits of {type(self.model).__name__} come from no linear layer")


class _Seen:
    """One forward pass of B images: the layer, its input [B, N, D], logits [B, N, K], boxes [B, N, 4] in shares."""

    def __init__(self, layer: nn.Linear, features: Tensor, logits: Tensor, boxes: Tensor) -> None:
        self.layer, self.features, self.logits, self.boxes = layer, features, logits, boxes


@contextmanager
def _recording(model: nn.Module) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    """Calls of the linear layers that could be classifiers (by name), in order; hooks are gone on exit."""
    calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, args[0], output))

    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "class" in n]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _plain(size: Any) -> dict[str, int]:
    return {k: int(v) for k, v in dict(size).items() if v is not None}


def open_detector(
    spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = ""
) -> TransformersAdapter:
    """Open the checkpoint folder ``spec`` (config.json, model.safetensors, preprocessor_config.json); nothing is
    downloaded.

    Args:
        spec: the folder, as ``save_pretrained`` writes it.
        device: where it runs.
        weights: must be None; the folder has them.
        arguments: JSON object; ``labels`` as for ``TransformersAdapter``.

    Raises:
        MissingExtraError: transformers is not installed. MissingFileError, FormatError: see the messages.
        InputError, UnknownNameError: arguments that do not fit. UnsupportedError: another kind of model.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    try:
        library = import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", "transformers") from None
    if weights is not None:
        raise InputError("a transformers checkpoint folder has its own weights", hint="leave out --weights")
    folder = Path(spec)
    for name in ("config.json", "preprocessor_config.json"):
        require(folder / name, "transformers checkpoint", hint="--detector transformers:FOLDER; nothing is downloaded")
    labels = _labels(arguments)
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind not in ACTIVATIONS:
            raise UnknownNameError(
                "transformers detector", str(kind), ACTIVATIONS, hint="others as arrays: docs/raw.md"
            )
        processor = library.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model, report = library.AutoModelForObjectDetection.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except CalibError:
        raise
    except ImportError as e:  # a backbone of timm, for one
        raise InputError(f"checkpoint {folder} needs a package: {str(e).strip().splitlines()[0]}") from e
    except Exception as e:  # whatever the library raises for damaged files
        raise FormatError(f"checkpoint {folder} cannot be read: {e}", hint="is it whole? copy it again") from e
    absent = sorted(report["missing_keys"])
    if absent:  # the library would leave them at random
        raise FormatError(
            f"checkpoint {folder} lacks {len(absent)} weights of the detector: {', '.join(absent[:3])} ..."
        )
    return TransformersAdapter(model, processor, f"transformers:{folder.name}", device, labels)


def _labels(arguments: str) -> list[int] | None:
    try:
        given = json.loads(arguments or "{}")
    except ValueError as e:
        raise InputError(f"detector arguments are not JSON: {e}", hint=_ARGUMENTS) from e
    strange = set(given) - {"labels"} if isinstance(given, dict) else {"?"}
    labels = None if strange else given.get("labels")
    if strange or (labels is not None and not (isinstance(labels, list) and all(type(k) is int for k in labels))):
        raise InputError(f"detector arguments are {arguments}: expected a list of outputs, labels", hint=_ARGUMENTS)
    return labels
