"""Adapter for Detectron2's GeneralizedRCNN with StandardROIHeads or CascadeROIHeads, unmodified.

Whether a subclass makes the same detections of the same logits is for ``proof`` to see; rows that are not finite, which
Detectron2 leaves out, are left out.

Hooks note the proposals entering ``roi_heads`` (with their ``objectness_logits``), the boxes that are pooled in each
stage of a cascade, and the input and output of ``roi_heads.box_predictor``; the forward pass ends with the last.
Training rows are labelled and sampled here, with the model's own matcher and counts: ``label_and_sample_proposals``
draws from torch's global generator and would not be repeatable. Background is last there too. Letters: N proposals of
one image, D feature size, C foreground classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace as changed
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.boxes import Boxes, rescale
from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import UnsupportedError
from calib.extract.adapter import (
    MASKS_AT_ONCE,
    Adapter,
    Image,
    MaskBranch,
    Own,
    Replace,
    RoIMap,
    RoIs,
    Sampling,
)
from calib.extract.modules import Recorded, recording, stages
from calib.extract.staging import array


class Detectron2Adapter(Adapter):
    """Records RoIs of a Detectron2 model in eval mode; pictures are resized as ``ResizeShortestEdge`` does.

    ``min_size`` (0: pictures stay as they are) and ``max_size`` are INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST of the
    training's config.

    Raises:
        UnsupportedError: another kind of model.
    """

    needs = ("proposal_generator", "roi_heads.box_head", "roi_heads.box_pooler")
    linear = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")

    def __init__(self, model: Any, source: str, device: torch.device, *, min_size: int = 800, max_size: int = 1333):
        super().__init__(model, device)
        heads = model.roi_heads
        self._predictors, self._generator = stages(heads.box_predictor), Generator(model.proposal_generator)
        low, high = heads.proposal_matcher.thresholds[1], heads.proposal_matcher.thresholds[-2]
        later = getattr(heads, "proposal_matchers", [heads.proposal_matcher])[1:]
        self.sampling = Sampling(
            float(high),
            float(low),
            int(heads.batch_size_per_image),
            float(heads.positive_fraction),
            next_ious=tuple(float(m.thresholds[-2]) for m in later),
        )
        augmentation = import_module("detectron2.data.transforms")
        self._resize = augmentation.ResizeShortestEdge([min_size, min_size], max_size)
        self._sides = (min_size, max_size)
        p = self._predictors[-1]  # its boxes and thresholds are those of the detections
        is_sigmoid = bool(p.use_sigmoid_ce)
        self._columns = slice(None, -1) if is_sigmoid else slice(None)
        self._agnostic = p.bbox_pred.out_features == 4
        self.detector = Detector(
            source=source,
            digest=self.classifier().digest(),
            num_classes=int(p.num_classes),
            feature_size=p.cls_score.in_features,
            activation="sigmoid" if is_sigmoid else "softmax",
            class_agnostic=self._agnostic,
            box_weights=tuple(float(w) for w in p.box2box_transform.weights),
            score_threshold=float(p.test_score_thresh),
            nms_iou=float(p.test_nms_thresh),
            max_detections=self._most_detections(p),
            min_box_side=float(np.finfo(np.float32).tiny),  # detector_postprocess leaves boxes without area out
            stages=len(self._predictors),
            settings={"min_size": min_size, "max_size": max_size, "format": model.input_format},
        )

    def _most_detections(self, predictor: Any) -> int:
        """TEST.DETECTIONS_PER_IMAGE; below 0: as many as proposals and classes can give."""
        most = int(predictor.test_topk_per_image)
        return most if most >= 0 else max(1, self._generator.most() * int(predictor.num_classes))

    def classifier(self) -> Classifier:
        """cls_score and bbox_pred; of a sigmoid detector without its background row, which is never used."""
        own, *later = (
            Classifier(
                weight=array(p.cls_score.weight)[self._columns],
                bias=array(p.cls_score.bias)[self._columns],
                box_weight=array(p.bbox_pred.weight),
                box_bias=array(p.bbox_pred.bias),
            )
            for p in self._predictors
        )
        return changed(own, next=tuple(later))

    def accepts(self, height: int, width: int) -> bool:
        """No side may be resized to nothing."""
        if not self._sides[0]:
            return True
        short, long = min(height, width), max(height, width)
        return bool(short * min(self._sides[0] / short, self._sides[1] / long) >= 1)

    @property
    def roi_map(self) -> RoIMap | None:
        """Of one stage whose box head is two linear layers."""
        heads = self.model.roi_heads
        layers = [m for m in heads.box_head.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        is_known = len(self._predictors) == 1 and len(layers) == 2 and all(isinstance(m, nn.Linear) for m in layers)
        return RoIMap.of(heads.box_pooler.output_size, (layers[0], layers[1])) if is_known else None

    def most_rows(self, mode: str) -> int:
        """From the RPN's cap on proposals and the box head's sample."""
        if mode == "train":
            return self.sampling.rows_per_image
        return self._generator.most()

    @torch.no_grad()
    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """Run the detector up to its classifier (see ``Adapter.launch``)."""
        seen = _Record([i.shape[:2] for i in images], replace, self._generator, len(self._predictors))
        training = self._generator.as_in_training() if replace is not None else nullcontext()
        heads = self.model.roi_heads
        with (
            training,
            recording(
                heads.register_forward_pre_hook(seen.enter_heads),
                heads.box_pooler.register_forward_pre_hook(seen.enter_pooler),
                *(head.register_forward_pre_hook(seen.enter_box_head) for head in stages(heads.box_head)),
                *(predictor.register_forward_hook(seen.leave_predictor) for predictor in self._predictors),
            ),
        ):
            self.model.inference([self._input(i) for i in images], do_postprocess=False)
        first, *later = (self._stage(seen, k) for k in range(len(self._predictors)))
        whole = changed(first, maps=array(seen.maps.flatten(1)) if maps else None, next=tuple(later))
        sizes = [(int(p.image_size[0]), int(p.image_size[1])) for p in seen.proposals]
        found = whole.split([len(p) for p in seen.proposals], sizes)
        return found if replace is not None else [_finite(r) for r in found]

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """The model's own, in the pixels of the picture (see ``Adapter.detections``)."""
        (found,) = self.model([self._input(image)])
        own = found["instances"]
        return Own(own.pred_classes.cpu().numpy(), array(own.scores), array(own.pred_boxes.tensor))

    def _input(self, image: Image) -> dict[str, Any]:
        pixels = image if self.model.input_format == "RGB" else image[:, :, ::-1]
        resized = self._resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
        return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}

    @property
    def mask_branch(self) -> MaskBranch | None:
        """``forward_with_given_boxes`` and ``detector_postprocess`` (see ``Adapter.mask_branch``)."""
        heads, base = self.model.roi_heads, import_module("detectron2.modeling.roi_heads").BaseMaskRCNNHead
        head = heads.mask_head if getattr(heads, "mask_on", False) else None
        return self._masks if isinstance(head, base) and type(head).forward is base.forward else None

    @torch.no_grad()
    def _masks(self, image: Image, boxes: Boxes, category: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
        structures = import_module("detectron2.structures")
        postprocess = import_module("detectron2.modeling.postprocessing").detector_postprocess
        given, size = self._input(image), (image.shape[0], image.shape[1])
        found = structures.Instances(tuple(given["image"].shape[1:]))
        found.pred_boxes = structures.Boxes(torch.from_numpy(rescale(boxes, size, found.image_size)))
        found.pred_classes, found.row = torch.from_numpy(category), torch.arange(len(boxes))
        (found,) = self.model.inference([given], [found], do_postprocess=False)
        for start in range(0, len(boxes), MASKS_AT_ONCE):
            part = postprocess(found[start : start + MASKS_AT_ONCE], *size)  # which leaves empty boxes out
            pasted = dict(zip(part.row.tolist(), part.pred_masks.cpu().numpy(), strict=True))
            for row in range(start, min(start + MASKS_AT_ONCE, len(boxes))):
                yield pasted.get(row, np.zeros(size, np.bool_))

    def _stage(self, seen: "_Record", k: int) -> RoIs:
        """RoIs of all images in stage ``k``."""
        features, logits, deltas = seen.stages[k]
        refined = None
        if self._agnostic:
            given = [_instances(p, boxes) for p, boxes in zip(seen.proposals, seen.boxes[k], strict=True)]
            moved = self._predictors[k].predict_boxes((logits, deltas), given)
            after = [type(own)(boxes) for own, boxes in zip(seen.boxes[k], moved, strict=True)]
            for boxes, p in zip(after, seen.proposals, strict=True):
                boxes.clip(p.image_size)
            refined = array(torch.cat([boxes.tensor for boxes in after]))
        return RoIs(
            proposals=array(torch.cat([own.tensor for own in seen.boxes[k]])),
            objectness=array(torch.cat([self._generator.objectness(p.objectness_logits) for p in seen.proposals])),
            features=array(features),
            logits=array(logits[:, self._columns]),
            refined=refined,
        )


class _Record:
    """What the hooks saw in one forward pass."""

    def __init__(self, original_sizes: list[Any], replace: Replace | None, generator: "Generator", stages: int) -> None:
        self.original_sizes, self.replace, self._generator = original_sizes, replace, generator
        self.proposals: list[Any] = []  # Instances with proposal_boxes and objectness_logits
        self.boxes: list[list[Any]] = []  # of every stage: the Boxes of every image
        self.stages: list[Any] = []  # features, logits, deltas
        self.maps: Any = torch.empty(0)
        self._last = stages

    def enter_heads(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before ``roi_heads``: note the proposals, exchange them when asked to."""
        images, features, proposals, *rest = args
        self.proposals = list(proposals)
        if self.replace is not None:
            for i, (own, original) in enumerate(zip(proposals, self.original_sizes, strict=True)):
                ratio = (own.image_size[0] / original[0], own.image_size[1] / original[1])
                boxes, logits = own.proposal_boxes.tensor, own.objectness_logits
                given = array(self._generator.objectness(logits))
                new, objectness = self.replace(i, array(boxes), given, ratio)
                other = type(own)(own.image_size)
                other.proposal_boxes = type(own.proposal_boxes)(torch.from_numpy(new).to(boxes))
                other.objectness_logits = self._generator.logits(torch.from_numpy(objectness).to(logits))
                self.proposals[i] = other
        return (images, features, self.proposals, *rest)

    def enter_pooler(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before ``box_pooler``: note the boxes of this stage."""
        self.boxes.append(list(args[1]))

    def enter_box_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before ``box_head``: note the pooled RoI maps."""
        self.maps = args[0]

    def leave_predictor(self, module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        """After ``box_predictor``: note its input and output, and stop after the last."""
        self.stages.append((args[0].flatten(1), *output))
        if len(self.stages) == self._last:
            raise Recorded


class Generator:
    """A proposal generator: Detectron2's RPN, or one like CenterNet, whose "objectness_logits" are probabilities and
    whose limits are attributes NAME_train and NAME_test."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_rpn = isinstance(module, import_module("detectron2.modeling.proposal_generator").RPN)

    def objectness(self, given: Tensor) -> Tensor:
        """[N] what proposals carry -> [N] in [0, 1]."""
        return given.sigmoid() if self._is_rpn else given.clamp(0, 1)

    def logits(self, objectness: Tensor) -> Tensor:
        """And back."""
        return objectness.logit() if self._is_rpn else objectness

    def most(self) -> int:
        """Proposals of an image at test time."""
        limit = self._module.post_nms_topk[False] if self._is_rpn else getattr(self._module, "post_nms_topk_test", None)
        if limit is None:
            raise UnsupportedError(
                f"{type(self._module).__name__} does not say how many proposals it keeps",
                hint="known are RPN (post_nms_topk) and CenterNet (post_nms_topk_test)",
            )
        return int(limit)

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """With as many proposals as in training. Undone on exit."""
        module: Any = self._module
        tables = [module.pre_nms_topk, module.post_nms_topk] if self._is_rpn else []
        own = [dict(table) for table in tables]
        names = [n for n in vars(module) if n.endswith("_test") and hasattr(module, f"{n[:-5]}_train")]
        attributes = {n: getattr(module, n) for n in names}
        for table in tables:
            table[False] = table[True]
        for name in names:
            setattr(module, name, getattr(module, f"{name[:-5]}_train"))
        try:
            yield
        finally:
            for table, before in zip(tables, own, strict=True):
                table.update(before)
            for name, value in attributes.items():
                setattr(module, name, value)


def _finite(rois: RoIs) -> RoIs:
    """Without the rows that are not finite in some stage."""
    parts = [x for r in (rois, *rois.next) for x in (r.proposals, r.features, r.logits, r.refined) if x is not None]
    whole = np.logical_and.reduce([np.isfinite(x).all(axis=1) for x in parts])
    return rois if whole.all() else rois[np.flatnonzero(whole)]


def _instances(proposals: Any, boxes: Any) -> Any:
    """``boxes`` as proposals of the same image."""
    other = type(proposals)(proposals.image_size)
    other.proposal_boxes = boxes
    return other
