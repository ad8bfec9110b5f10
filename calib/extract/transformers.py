"""Adapter for detectors of Hugging Face transformers with queries (DETR and its kin), unmodified: these are the RoIs.

The class layer is found by what it computes: it is the linear layer whose output the model returns as ``logits``. A
hook notes its input. Detectors whose classes are prompts: ``transformers_text``. There is no non-maximum suppression
(nms_iou 1), and queries cannot be exchanged for ground truth: training rows are the queries themselves, each object
given to one of them, as these detectors train. Letters: N queries, D feature size, C foreground classes.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import InputError, UnsupportedError
from calib.extract.adapter import Adapter, ClassRule, Image, Own, Replace, RoIs, Sampling
from calib.extract.modules import recording
from calib.extract.staging import array

LABELS_HINT = "--detector-args '{\"labels\": [1, 2, 3, 5]}'"


@dataclass(frozen=True)
class Family:
    """What a kind of detector makes of its logits.

    ``activation``: softmax detectors have one output more, "no object", and it is last; sigmoid detectors have none.
    ``kept``: the most detections that the post-processing leaves; None, as many as there are queries.
    """

    activation: str
    kept: int | None = None


# By ``model_type``.
FAMILIES = {
    "detr": Family("softmax"),
    "table-transformer": Family("softmax"),
    "yolos": Family("softmax"),
    "conditional_detr": Family("sigmoid", 100),
    "dab-detr": Family("sigmoid", 100),
    "deformable_detr": Family("sigmoid", 100),
    "lw_detr": Family("sigmoid", 100),
    "d_fine": Family("sigmoid"),
    "deimv2": Family("sigmoid"),
    "rf_detr": Family("sigmoid"),
    "rt_detr": Family("sigmoid"),
    "rt_detr_v2": Family("sigmoid"),
}
_TEXT = "it detects text by segmentation and has no class layer"
# Detectors of the library that do not fit, and why.
REFUSED = {
    "omdet-turbo": "it keeps its best queries before it suppresses overlaps; calib cuts off after that",
    "pp_doclayout_v2": "its queries are sorted behind the class layer",
    "pp_doclayout_v3": "its class layer also chooses the queries, so another one there would change these",
    "pp_doclayout_v4": "its boxes are quadrilaterals",
    "pp_ocrv5_mobile_det": _TEXT,
    "pp_ocrv5_server_det": _TEXT,
    "pp_ocrv6_medium_det": _TEXT,
    "pp_ocrv6_small_det": _TEXT,
}


@dataclass(frozen=True)
class Seen:
    """One forward pass of B images; boxes are centre and size in shares of the picture."""

    features: Tensor  # [B, N, D]
    logits: Tensor  # [B, N, K]
    boxes: Tensor  # [B, N, 4]


class QueryAdapter(Adapter):
    """Records the queries of a detector; subclasses say what is a query's feature and what are its logits."""

    takes_proposals = False
    processor: Any  # of pictures
    _columns: list[int]  # outputs for the classes and, of a softmax, the background
    _activation: str

    @abstractmethod
    def _run(self, images: list[Image]) -> Seen:
        """One forward pass."""

    def accepts(self, height: int, width: int) -> bool:
        """No side may be resized to nothing; detectors with one input size take every picture."""
        size = dict(self.processor.size)
        short, long = min(height, width), max(height, width)
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            return True
        return bool(short * min(size["shortest_edge"] / short, size["longest_edge"] / long) >= 1)

    def most_rows(self, mode: str) -> int:
        """The number of queries."""
        return self.sampling.rows_per_image

    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """The queries of every image, with the boxes that the detector gives them, in original pixels."""
        seen = self._run(images)
        out = []
        for i, image in enumerate(images):
            logits = array(seen.logits[i])[:, self._columns]
            height, width = self._box_size(*image.shape[:2])
            # In torch and in this order, as the library's own post-processing: float32 rounds alike.
            centre, half = seen.boxes[i, :, :2], 0.5 * seen.boxes[i, :, 2:]
            corners = torch.cat([centre - half, centre + half], dim=1)
            boxes = array(corners * torch.tensor([width, height, width, height], device=corners.device))
            p = torch.from_numpy(logits)
            objectness = (
                p.softmax(1)[:, :-1].sum(1).clamp(0, 1) if self._activation == "softmax" else p.sigmoid().amax(1)
            )
            features, size = array(seen.features[i]), (image.shape[0], image.shape[1])
            out.append(RoIs(boxes, objectness.numpy(), features, logits, boxes, size))
        return out

    def _box_size(self, height: int, width: int) -> tuple[int, int]:
        """What shares of a box are of, in pixels of the picture."""
        return height, width

    def _describe(self, source: str, kind: str, queries: int, kept: int | None, **settings: Any) -> None:
        """Set ``sampling`` and ``detector``, once the classifier is known."""
        classifier, size = self.classifier(), {k: int(v) for k, v in dict(self.processor.size).items() if v is not None}
        self.sampling = Sampling(rows_per_image=queries, foreground_share=1.0, one_to_one=True)
        self.detector = Detector(
            source=source,
            digest=classifier.digest(),
            num_classes=len(self._columns) - (self._activation == "softmax"),
            feature_size=classifier.weight.shape[1],
            activation=self._activation,
            nms_space="original",
            score_threshold=0.0,
            nms_iou=1.0,
            max_detections=kept or queries,
            settings={"model": kind, "size": size, **settings},
        )

    def _inputs(self, images: list[Image]) -> dict[str, Tensor]:
        inputs = self.processor(images=images, return_tensors="pt", input_data_format="channels_last").to(self.device)
        return {k: inputs[k] for k in ("pixel_values", "pixel_mask") if k in inputs}


class TransformersAdapter(QueryAdapter):
    """A detector in eval mode whose queries end in one linear classifier.

    ``labels``: the outputs that stand for the categories, in ascending category id. Where it is None all of them do, by
    the names of ``id2label`` if all of these are categories, else in ascending category id too. Outputs that are left
    out are no rows of the classifier. Beside a softmax they must then be such as are never found (COCO's numbers
    without a class): a column for the rest of the softmax would not be linear in the features, which heads need.

    Raises:
        UnsupportedError: another kind of model. InputError: ``labels`` are no outputs.
    """

    def __init__(
        self, model: Any, processor: Any, source: str, device: torch.device, labels: list[int] | None = None
    ) -> None:
        kind = model_type(model)
        if kind not in FAMILIES:
            raise refused(kind)
        super().__init__(model, device)
        self.processor = processor
        self._activation = FAMILIES[kind].activation
        seen = self._run([np.zeros((64, 64, 3), np.uint8)])
        has_background = self._activation == "softmax"
        own = self._layer.out_features - has_background
        if labels is not None and not (len(set(labels)) == len(labels) > 0 and all(0 <= k < own for k in labels)):
            raise InputError(f"labels must be different outputs from 0 to {own - 1}", hint=LABELS_HINT)
        self._columns = [*(range(own) if labels is None else labels), *([own] if has_background else [])]
        named = tuple(str(name) for _, name in sorted(model.config.id2label.items()))
        has_names = labels is None and len(named) == own and not any(n.startswith("LABEL_") for n in named)
        self.classes = ClassRule("names", named, hint=LABELS_HINT) if has_names else ClassRule()
        self._describe(source, kind, seen.logits.shape[1], FAMILIES[kind].kept, labels=labels)

    def classifier(self) -> Classifier:
        """The last linear layer (see ``Adapter.classifier``)."""
        bias = None if self._layer.bias is None else array(self._layer.bias)[self._columns]
        return Classifier(array(self._layer.weight)[self._columns], bias)

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """Those of the library's own post-processing; with a softmax every query gives its best class."""
        outputs = self.model(**self._inputs([image]))
        (found,) = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.shape[:2]])
        score, label = array(found["scores"]), found["labels"].cpu().numpy()
        place = np.full(outputs.logits.shape[2], -1)
        place[self._columns[: self.detector.num_classes]] = np.arange(self.detector.num_classes)
        chosen = place[label] >= 0
        row, remark = None, ""
        if self._activation == "softmax":
            p = outputs.logits[0].softmax(1)
            row = np.flatnonzero(array(p[:, :-1].amax(1)) > 0)[chosen]
            others = float((1 - p[:, self._columns].sum(1)).max())
            if p.shape[1] > len(self._columns):
                remark = (
                    f"the outputs that labels leaves out take up to {others:.1%} of a query's softmax, and a cache has "
                    "no column for them: name all classes of the detector in labels and in the annotation file, those "
                    "without objects, too"
                )
        cut = 0.0 if chosen.all() else float(score.min())  # the others took places
        return Own(place[label][chosen], score[chosen], array(found["boxes"])[chosen], row, cut, remark)

    @torch.no_grad()
    def _run(self, images: list[Image]) -> Seen:
        calls: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((module, args[0], output))

        # Those that could be classifiers, by name.
        layers = [m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and "class" in n]
        with recording(*(layer.register_forward_hook(note) for layer in layers)):
            found = self.model(**self._inputs(images))
        for layer, given, output in reversed(calls):
            if torch.equal(output, found.logits):
                self._layer = layer
                return Seen(given, found.logits, found.pred_boxes)
        raise UnsupportedError(f"the logits of {type(self.model).__name__} come from no linear layer")


def model_type(model: Any) -> str:
    """What the library calls the kind of ``model``; of another object, its class."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def refused(kind: str) -> UnsupportedError:
    """Why detectors of this kind are not taken."""
    why = REFUSED.get(kind, "it is no detector whose queries end in one linear classifier")
    return UnsupportedError(
        f"{kind} cannot be extracted: {why}",
        hint=f"known: {', '.join(FAMILIES)}; others can come as arrays: docs/raw.md",
    )
