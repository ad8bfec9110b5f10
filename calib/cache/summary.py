"""What a cache is, from its manifest and its tables: the bytes of features are never touched."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from calib.cache.categories import Categories
from calib.cache.mirrored import fetch_meta
from calib.cache.schema import IGNORE, META_SCHEMA, Manifest
from calib.cache.tables import read_table
from calib.layout import CATEGORIES, META, SHARDS
from calib.storage.mirror import origin

EDGES = (1, 10, 100, 1000)  # of training instances: none, then AP1 to AP4


def summarise(path: Path) -> dict[str, Any]:
    """Metrics of the cache at ``path``, complete or not, archived or not.

    ``bytes`` per family of files; ``labels``: rows whose label has so many training instances, of background, ignored;
    of a cascade, whose ``rows`` are those of one stage, in its first one.

    Raises:
        MissingFileError, FormatError, VersionError: manifest, categories or meta tables are lost or damaged.
    """
    manifest = Manifest.read(path)
    if origin(path) is not None:
        fetch_meta(path, manifest)
    sizes: dict[str, int] = {}
    for shard in manifest.shards:
        for name, what in shard.files.items():
            family = name.partition(".")[0]
            sizes[family] = sizes.get(family, 0) + what["bytes"]
    detector = manifest.detector
    return {
        "cache": manifest.digest,
        "layout": manifest.layout,
        "complete": manifest.complete,
        "mode": manifest.mode,
        "style": manifest.style or None,
        "detector": detector.source,
        "activation": detector.activation,
        "head": detector.head_type,
        "classes": detector.num_classes,
        "feature_size": detector.feature_size,
        "dtype": manifest.dtype,
        "logits": manifest.logits,
        "roi_maps": list(manifest.roi_maps) or None,
        "stages": detector.stages,
        "rows": manifest.rows,
        "images": sum(s.images for s in manifest.shards),
        "shards": len(manifest.shards),
        "bytes": sizes | {"all": sum(sizes.values())},
        "labels": _labels(path, manifest),
        "source": manifest.source,
        "proof": manifest.proof_text(),
    }


def _labels(path: Path, manifest: Manifest) -> dict[str, int]:
    instances = Categories.read(path / CATEGORIES).instance_count
    c = len(instances)
    rows = np.zeros(c + 2, np.int64)  # the last one: to be ignored
    for shard in manifest.shards:
        label = read_table(path / SHARDS / shard.name / META, META_SCHEMA.empty_table().select(["label"]).schema)
        values = label["label"].to_numpy()
        rows += np.bincount(np.where(values == IGNORE, c + 1, values), minlength=c + 2)[: c + 2]
    per_bin = np.bincount(np.digitize(instances, EDGES), weights=rows[:c], minlength=len(EDGES) + 1)
    names = ["0", *(f"{a}-{b - 1}" for a, b in itertools.pairwise(EDGES)), f"{EDGES[-1]}+"]
    found = {name: int(n) for name, n in zip(names, per_bin, strict=True)}
    return found | {"background": int(rows[c]), "ignored": int(rows[c + 1])}
