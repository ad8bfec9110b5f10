"""How fast is calib data split, and how near to the wanted shares does it come?

On made-up annotation files with the statistics of LVIS v1 and a polygon per object. Times are CPU seconds: of the
division alone, and of everything from file to files. Deviation is the distance of a part's share of a category's images
from the wanted share, a mean over parts and the categories of two or more images; ``chance`` is that of parts of the
same sizes drawn at random. ``lacking`` are the categories with as many images as parts that some part has none of.
``scenes`` keeps eight images together each.

    python benchmarks/division.py                 the sizes of LVIS val and train: 8 GiB of memory
    python benchmarks/division.py --quick         2,000 images

A table goes to stderr, one JSON object to stdout.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from _simulated_split import TRAIN_IMAGES, VAL_IMAGES, simulate_document
from numpy.typing import NDArray

from calib.annotations import Annotations
from calib.data.shares import Shares, fold_shares, parse_shares
from calib.data.split import Division, split_file, split_images

POLYGON = 44  # numbers per object
SCENE = 8  # images


def write_source(n_images: int, path: Path) -> None:
    """The made-up file; ``scene`` of an image is of its id."""
    document = simulate_document(n_images)
    polygons = np.random.default_rng(0).uniform(0, 480, (len(document["annotations"]), POLYGON)).round(2)
    for annotation, polygon in zip(document["annotations"], polygons.tolist(), strict=True):
        annotation["segmentation"] = [polygon]
    for image in document["images"]:
        image["scene"] = image["id"] // SCENE
    path.write_bytes(orjson.dumps(document))


def nearness(read: Annotations, parts: dict[str, NDArray[np.int64]], shares: Shares) -> dict[str, float | int]:
    """Deviations and lacking categories of ``parts``, and of parts drawn at random."""
    part = np.empty(len(read.images.id), np.int64)
    for j, ids in enumerate(parts.values()):
        part[np.isin(read.images.id, ids)] = j
    mean, lacking = _deviation(read, part, shares)
    chance, lacking_by_chance = _deviation(read, np.random.default_rng(0).permutation(part), shares)
    return {"deviation": mean, "chance": chance, "lacking": lacking, "lacking_by_chance": lacking_by_chance}


def _deviation(read: Annotations, part: NDArray[np.int64], shares: Shares) -> tuple[float, int]:
    n = len(read.categories.id)
    image, category = np.divmod(np.unique(read.image * n + read.category), n)
    images = np.stack([np.bincount(category[part[image] == j], minlength=n) for j in range(len(shares))])
    total, wanted = images.sum(axis=0), np.array([float(s) for s in shares.values()])
    often = total >= 2
    mean = np.abs(images[:, often] / total[often] - wanted[:, None]).mean()
    return float(mean), int(((images == 0).any(axis=0) & (total >= len(shares))).sum())


def measure(n_images: int, folder: Path) -> list[dict[str, Any]]:
    """A row for every division of a file of ``n_images``."""
    source = folder / "source.json"
    write_source(n_images, source)
    read = Annotations.read(source)
    rows = []
    for name, shares, group_by in (
        ("tune=0.4,test=0.6", parse_shares("tune=0.4,test=0.6"), ""),
        ("tune=0.1,test=0.9", parse_shares("tune=0.1,test=0.9"), ""),
        ("5 folds", fold_shares(5), ""),
        ("tune=0.4,test=0.6, scenes", parse_shares("tune=0.4,test=0.6"), "scene"),
    ):
        groups = read.images.id // SCENE if group_by else None
        start = time.process_time()
        parts = split_images(read, shares, groups=groups)
        alone = time.process_time() - start
        start = time.process_time()
        split_file(source, folder / "parts", Division(shares, group_by=group_by), overwrite=True)
        metrics = {"images": n_images, "annotations": len(read.id), "megabytes": source.stat().st_size / 1e6}
        seconds = {"divide_s": alone, "file_s": time.process_time() - start}
        rows.append({"parts": name, **metrics, **seconds, **nearness(read, parts, shares)})
    return rows


def main() -> None:
    """Print the table and the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 images")
    sizes = [2_000] if parser.parse_args().quick else [VAL_IMAGES, TRAIN_IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for n in sizes for row in measure(n, Path(folder))]
    for row in rows:
        told = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(told, file=sys.stderr)
    print(json.dumps({"divisions": rows}))


if __name__ == "__main__":
    main()
