"""``calib show``."""

from pathlib import Path
from typing import Annotated

import typer

from .console import path_or_url


def show(
    path: Annotated[Path, typer.Argument(parser=path_or_url, help="a head folder or a cache folder")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Print what a head or a cache is: method, settings, seed, detector, sizes.

    Examples: calib show models/bags/1; calib show caches/val
    """
    from calib.errors import FormatError
    from calib.files import require
    from calib.layout import DESCRIPTION, MANIFEST

    from .console import report

    require(path, "head or cache")
    if (path / DESCRIPTION).is_file():
        from calib.artifact import describe, load

        head = describe(path)
        info = head.info
        metrics = {
            "method": info.method,
            "settings": info.settings,
            "seed": info.seed,
            "processes": info.processes,
            "head": head.kind,
            "classes": len(info.category_ids),
            "feature_size": head.feature_size or load(path).head.feature_size,
            "parameters": head.parameters,
            "detector": info.detector.get("source"),
            "cache": info.cache_digest,
            "calib": info.calib_version,
        } | ({"base": info.base} if info.base else {})
    elif (path / MANIFEST).is_file():
        from calib.cache import Cache

        cache = Cache(path)
        manifest = cache.manifest
        metrics = {
            "mode": manifest.mode,
            "rows": manifest.rows,
            "images": len(cache.images),
            "classes": manifest.detector.num_classes,
            "feature_size": manifest.detector.feature_size,
            "dtype": manifest.dtype,
            "logits": manifest.logits,
            "shards": len(manifest.shards),
            "bytes": sum(f["bytes"] for s in manifest.shards for f in s.files.values()),
            "detector": manifest.detector.source,
            "proof": manifest.proof_text(),
            "cache": cache.digest,
        }
    else:
        raise FormatError(
            f"{path} is neither a head nor a cache",
            hint="a head folder is MODELS/NAME/VERSION, a cache one that calib extract wrote",
        )
    report(metrics, as_json)
