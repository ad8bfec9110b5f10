"""What extraction asks of a detector. One adapter per framework; frameworks are imported inside their adapter only.

Letters: N proposals of one image, D feature size, C foreground classes. Background is the last column; boxes are xyxy
in the pixels of the network's input (after the detector's own resizing).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes
from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]  # [height, width, 3] RGB

# picture, [K, 4] boxes in its pixels, [K] class indices -> [height, width] masks, in the order of boxes
MaskBranch = Callable[[Image, Boxes, NDArray[np.int64]], Iterator[NDArray[np.bool_]]]
MASKS_AT_ONCE = 32  # a pasted mask is as large as the picture, in float32


@dataclass(frozen=True)
class Sampling:
    """How the detector chooses RoIs when it trains: IoU of foreground and background, rows, share of foreground.

    ``one_to_one``: an object has one RoI and its others are background, as where nothing suppresses duplicates. In the
    next stages of a cascade RoIs are those of the first, moved; they are foreground from ``next_ious`` up.
    """

    foreground_iou: float = 0.5
    background_iou: float = 0.5
    rows_per_image: int = 512
    foreground_share: float = 0.25
    one_to_one: bool = False
    next_ious: tuple[float, ...] = ()


@dataclass(frozen=True)
class RoIs:
    """What the detector computed for the N proposals of one image, or of all images of a batch one after the other."""

    proposals: Boxes  # [N, 4]
    objectness: NDArray[np.float32]  # [N] in [0, 1]
    features: NDArray[np.float32]  # [N, D], the classifier's input
    logits: NDArray[np.float32]  # [N, C+1]
    refined: Boxes | None = None  # [N, 4] decoded and clipped; None where boxes are class-specific
    net_size: tuple[int, int] = (0, 0)  # height, width of the network's input
    maps: NDArray[np.float32] | None = None  # [N, channels * height * width], where asked for
    next: tuple["RoIs", ...] = ()  # of a cascade: the same RoIs in its later stages

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> "RoIs":
        """Some of the RoIs."""
        columns: dict[str, Any] = {k: v[rows] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **columns, next=tuple(stage[rows] for stage in self.next))

    def split(self, counts: list[int], net_sizes: list[tuple[int, int]]) -> list["RoIs"]:
        """Of a batch -> of each image, of which it has ``counts`` RoIs."""
        out = []
        for n, end, size in zip(counts, np.cumsum(counts), net_sizes, strict=True):
            own = self[end - n : end]
            out.append(replace(own, net_size=size, next=tuple(replace(s, net_size=size) for s in own.next)))
        return out


@dataclass(frozen=True)
class RoIMap:
    """The pooled map of a RoI: channels, height, width, and the two linear layers from it to the feature."""

    shape: tuple[int, int, int]
    layers: tuple[Any, Any]

    @classmethod
    def of(cls, pooled: tuple[int, int], layers: tuple[Any, Any]) -> "RoIMap":
        """By the pooler's height and width and the width of the first layer."""
        height, width = pooled
        return cls((layers[0].in_features // (height * width), height, width), layers)


@dataclass(frozen=True)
class Own:
    """What the detector itself detects in one picture, in any order. Letter: K detections.

    ``row``: where a RoI gives its best class only (DETR with a softmax), the RoI of each detection. Detections with
    scores up to ``cut`` may be missing, as others that do not count here took their places. ``remark``: why a cache may
    not give these, where the adapter knows.
    """

    category: NDArray[np.int64]  # [K] class index
    score: NDArray[np.float32]  # [K]
    box: Boxes  # [K, 4] in the pixels of the picture
    row: NDArray[np.int64] | None = None  # [K]
    cut: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class ClassRule:
    """Which category each class of a detector is (``classes.in_class_order``).

    ``order``: ``id``, ascending category id; ``json``, as the TRAIN json lists its categories; ``names``, by ``names``
    where all of them are categories, else ``id``. ``names`` [C]: what the detector calls its classes, empty where it
    has no names; with ``has_all`` none may be missing from the json. ``hint``: what to do about a contradiction.
    ``hints``: names beside, of the checkpoint or the framework's data sets, which decide nothing (``calib doctor``
    compares them with the json's).
    """

    order: str = "id"
    names: tuple[str, ...] = ()
    has_all: bool = False
    hint: str = "use the annotation file the detector was trained with"
    hints: tuple[str, ...] = ()


# (image number in the batch, proposals, objectness, (ratio_y, ratio_x) network over original) -> proposals, objectness
Replace = Callable[[int, Boxes, NDArray[np.float32], tuple[float, float]], tuple[Boxes, NDArray[np.float32]]]


class Adapter(ABC):
    """A frozen detector in eval mode, whose forward pass is in ``precision``: fp32, or bf16 and fp16 by autocast.

    A subclass has ``launch`` or ``rois``. ``needs``: parts of the model by their dotted names, in all stages of a
    cascade, and ``linear``, those that must be linear layers.

    Raises:
        UnsupportedError: the model lacks one.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    takes_proposals: ClassVar[bool] = True  # ``launch`` can exchange them; queries of a decoder are what they are
    precision: str = "fp32"
    classes: ClassRule = ClassRule()
    detector: Detector
    sampling: Sampling

    def __init__(self, model: Any, device: "torch.device") -> None:
        from calib.extract.modules import lacking  # with torch, which those who only name adapters do without

        if missing := lacking(model, self.needs, self.linear):
            raise UnsupportedError(
                f"{type(model).__name__} cannot be extracted: it has no {', '.join(missing)}, or of another kind",
                hint="other detectors can come as arrays: docs/raw.md",
            )
        self.model: Any = model.eval().to(device)
        self.device = device

    @property
    def roi_map(self) -> RoIMap | None:
        """What is pooled of a RoI; None where ``launch`` cannot keep it."""
        return None

    @property
    def mask_branch(self) -> MaskBranch | None:
        """The detector's own masks of detections, whatever scored them; None where it has none that calib knows."""
        return None

    @abstractmethod
    def classifier(self) -> Classifier:
        """The detector's last layer, background last."""

    @abstractmethod
    def accepts(self, height: int, width: int) -> bool:
        """Whether a picture of this size survives the detector's own resizing."""

    @abstractmethod
    def most_rows(self, mode: str) -> int:
        """The largest number of rows that one image can give, extracted in ``mode`` (train or test)."""

    def launch(
        self, images: list[Image], replace: Replace | None = None, *, maps: bool = False
    ) -> Callable[[], list[RoIs]]:
        """Run the detector up to its classifier; ``maps`` keeps the pooled RoI maps.

        What is returned gives the results, once, on any thread; until then they may be on their way from the device,
        and the next launch need not wait for them.

        ``replace`` exchanges the proposals of an image before RoI features are computed (training-mode sampling); the
        proposals are then those of the detector's training mode.
        """
        found = self.rois(images, replace, maps=maps)
        return lambda: found

    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """What ``launch`` gives."""
        return self.launch(images, replace, maps=maps)()

    @abstractmethod
    def detections(self, image: Image) -> Own:
        """What the live model itself detects, by its public forward pass: nothing of calib has a part in it.

        Raises:
            UnsupportedError: the model returns something else.
        """
