"""Pages with coloured rectangles, so that a tile's picture shows where its objects are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Document = dict[str, Any]
COLOURS = {3: (200, 10, 10), 5: (10, 200, 10), 8: (10, 10, 200), 9: (180, 180, 20)}


@pytest.fixture
def pages(tmp_path: Path) -> Callable[..., Path]:
    """``pages(boxes, size=(height, width), change=...)``: a json of pages with ``boxes``: for every page a list of
    (category id, x, y, width, height). LVIS: of category 9 it is known that it is absent, 8 is not exhaustive."""

    def write(
        boxes: list[list[tuple[int, int, int, int, int]]],
        size: tuple[int, int] = (100, 130),
        change: Callable[[Document], object] = lambda d: None,
    ) -> Path:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        images, annotations = [], []
        for k, own in enumerate(boxes):
            pixels = np.random.default_rng(k).integers(0, 256, (*size, 3), np.uint8)
            for category, x, y, width, height in own:
                pixels[y : y + height, x : x + width] = COLOURS[category]
                bbox = {"bbox": [x, y, width, height], "area": width * height}
                ids = {"id": 10 * len(annotations) + 7, "image_id": 100 - k, "category_id": category}
                annotations.append(ids | bbox | {"mine": len(annotations)})
            Image.fromarray(pixels).save(tmp_path / "pictures" / f"p{k}.png")
            record = {"id": 100 - k, "file_name": f"p{k}.png", "height": size[0], "width": size[1], "scene": k % 2}
            images.append(record | {"neg_category_ids": [9], "not_exhaustive_category_ids": [8]})
        categories = [
            {"id": i, "name": f"c{i}", "instance_count": 50, "image_count": 40, "frequency": "c"} for i in COLOURS
        ]
        document: Document = {"images": images, "annotations": annotations, "categories": categories}
        change(document)
        path = tmp_path / "pages.json"
        path.write_text(json.dumps(document))
        return path

    return write


def as_coco(document: Document) -> None:
    """Take LVIS's lists and counts away."""
    for record in document["images"]:
        del record["neg_category_ids"], record["not_exhaustive_category_ids"]
    for record in document["categories"]:
        del record["instance_count"], record["image_count"], record["frequency"]
