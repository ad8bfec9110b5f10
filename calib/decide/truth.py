"""The labels that a cache holds, to judge by: those of its annotation file, to the last bit."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calib.annotations import FEDERATED, Annotations, CategoryLists, CategoryRows, Images, located
from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.evaluate import GroundTruth
from calib.evaluate.ground_truth import Style


def ground_truth(cache: Cache, style: Style | None = None) -> GroundTruth:
    """The split's labels as the cache holds them, in the style of its annotation file unless another is given.

    Raises:
        MissingFileError: it holds none. UnsupportedError: it does not hold what judging in this style takes.
    """
    table, classes = cache.annotations(), cache.categories
    images = cache.images.sort_by("image_id")
    lists = [_lists(images[key]) for key in FEDERATED]
    has_style = bool(cache.manifest.style)
    if not has_style and not any(len(one.ids) for one in lists):
        raise UnsupportedError(
            f"cache {cache.path} does not say how its split is annotated: an older calib wrote it, and no image has a "
            "category that is known to be absent",
            hint="extract it again; of a COCO json every category is known in every image",
        )
    own: Style = "coco" if cache.manifest.style == "coco" else "lvis"
    if style == "coco" and not has_style:
        raise UnsupportedError(
            f"cache {cache.path} does not say which objects are crowds: an older calib wrote it",
            hint="extract it again, or add --annotations",
        )
    if style == "lvis" and own == "coco":
        raise UnsupportedError(
            f"cache {cache.path} is of a COCO json, which does not say what is known to be absent from an image",
            hint="judge it in its own style, coco",
        )
    order = np.argsort(classes.category_id)
    where, image_id = f"{cache.path}: annotations", images["image_id"].to_numpy()
    size = np.stack([images[key].to_numpy() for key in ("height", "width")], axis=1).astype(np.int64)
    rows = Annotations(
        path=cache.path,
        style=own,
        images=Images(image_id, size, {}, *lists),
        categories=CategoryRows(
            id=classes.category_id[order],
            name=tuple(classes.name[k] for k in order),
            frequency=tuple(classes.frequency[k] for k in order),
            instance_count=classes.instance_count[order],
            image_count=classes.image_count[order],
            listed=tuple(classes.category_id.tolist()),
        ),
        id=table["id"].to_numpy(),
        image=located(table["image_id"].to_numpy(), image_id, "image_id", where),
        category=located(table["category_id"].to_numpy(), classes.category_id[order], "category_id", where),
        box=np.stack([table[key].to_numpy() for key in ("x1", "y1", "width", "height")], axis=1),
        area=table["area"].to_numpy(),
        ignore=table["ignore"].to_numpy(),
        crowd=table["crowd"].to_numpy(),
    )
    return GroundTruth.of(rows, style or own)


def _lists(column: pa.ChunkedArray) -> CategoryLists:
    start = np.cumsum([0, *pc.list_value_length(column).to_pylist()], dtype=np.int64)
    return CategoryLists(start, pc.list_flatten(column).to_numpy())
