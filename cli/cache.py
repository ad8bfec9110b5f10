"""``calib cache``: what a feature cache is, whether it is sound, and caches made of caches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import bar, named, path_or_url, report

if TYPE_CHECKING:
    from calib.cache import Manifest
    from calib.cache.damage import Damage

SHOWN = 10  # image ids in a line for people; --json has all
app = typer.Typer(no_args_is_help=True, help="Look at, check, mend and remake feature caches.")
_Cache = Annotated[Path, typer.Argument(help="Cache folder.")]
_Seen = Annotated[Path, typer.Argument(parser=path_or_url, help="Cache folder, or its URL.")]
_Out = Annotated[Path, typer.Option(help="Cache folder to write. Interrupted, the same command goes on.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


@app.callback()
def cache() -> None:
    """Look at, check, mend and remake feature caches."""


@app.command(epilog="Example: calib cache info caches/train")
def info(cache: _Seen, as_json: _AsJson = False) -> None:
    """Print what a cache is: detector, sizes, rows per bin of training instances. Features are not touched."""
    from calib.cache.summary import summarise

    report(summarise(cache), as_json)


@app.command(epilog="Example: calib cache check caches/train")
def check(cache: _Seen, as_json: _AsJson = False) -> None:
    """Read every file of a cache and compare it with what was written; exit code 1 if it is damaged or incomplete.

    Names every damaged, missing or foreign file and the images in it. Nothing is changed.
    """
    from dataclasses import asdict

    from calib.cache.damage import find_damage

    found = find_damage(cache, progress=bar)
    if as_json:
        metrics = {"path": named(cache), "sound": not found.damages, **asdict(found)}
        report(metrics | {"shards": found.shards, "image_ids": found.image_ids}, as_json=True)
    else:
        for damage in found.damages:
            typer.echo(_line(damage))
        for name in found.unlisted:
            typer.echo(f"shards/{name}: not listed in the manifest, never read")
        typer.echo(f"{found.files} files, {found.bytes:,} bytes: {_verdict(len(found.damages))}")
    if found.damages:
        typer.echo(f"hint: calib cache repair {named(cache)}", err=True)
    elif not found.complete:
        typer.echo("incomplete: run the command that began it again (calib extract: with --resume)", err=True)
    if found.damages or not found.complete:
        raise typer.Exit(1)


@app.command(epilog="Example: calib cache repair caches/train")
def repair(cache: _Cache, as_json: _AsJson = False) -> None:
    """Take damaged shards out of a cache, so that they can be written again.

    Then run the command that wrote the cache again (calib extract: with --resume): it writes exactly what is missing.
    Damaged files are kept in the folder damaged/ of the cache. Nothing reads it: remove it once you have looked.
    """
    from calib.cache.repair import repair as run

    done = run(cache, progress=bar)
    report(
        {
            "cache": str(cache),
            "shards_taken_out": list(done.shards),
            "tables_taken_out": list(done.tables),
            "images_to_write_again": done.images_lost,
            "rows_left": done.rows_left,
            "complete": done.complete,
        },
        as_json,
    )
    if done.report.damages:
        typer.echo("hint: run the command that wrote it again (calib extract: with --resume)", err=True)


@app.command(epilog="Example: calib cache merge caches/a caches/b --out caches/ab")
def merge(
    caches: Annotated[list[Path], typer.Argument(help="Two or more cache folders of different images.")],
    out: _Out,
    as_json: _AsJson = False,
) -> None:
    """Make one cache of several with the same detector, mode, dtype and categories.

    Files of shards are hard-linked, or copied where the disk has no hard links.
    """
    from calib.cache.merge import merge as run

    _tell(out, run(caches, out, progress=bar), as_json)


@app.command(epilog="Example: calib cache sample caches/train --images 1000 --seed 1 --out caches/small")
def sample(
    cache: _Cache,
    images: Annotated[int, typer.Option(min=1, help="Number of images.")],
    out: _Out,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same images.")] = 0,
    as_json: _AsJson = False,
) -> None:
    """Make a smaller cache of whole images drawn at random."""
    from calib.cache.rewrite import sample as run

    _tell(out, run(cache, out, images=images, seed=seed, progress=bar), as_json)


@app.command(epilog="Example: calib cache compact caches/train --rows-per-shard 200000 --out caches/even")
def compact(
    cache: _Cache,
    out: _Out,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows of a shard; images are not divided.")] = 131_072,
    as_json: _AsJson = False,
) -> None:
    """Write the same rows in the same order in shards of even size."""
    from calib.cache.rewrite import compact as run

    _tell(out, run(cache, out, rows_per_shard=rows_per_shard, progress=bar), as_json)


@app.command(epilog="Example: calib cache archive caches/train --out archives/train")
def archive(cache: _Cache, out: _Out, as_json: _AsJson = False) -> None:
    """Compress a cache for keeping: ordinary Parquet with zstd, which every tool reads and training does not."""
    from calib.cache.archive import archive as run

    _tell(out, run(cache, out, progress=bar), as_json)


@app.command(epilog="Example: calib cache unpack archives/train --out caches/train")
def unpack(cache: _Cache, out: _Out, as_json: _AsJson = False) -> None:
    """Turn an archive back into the cache it was made of, bit for bit."""
    from calib.cache.archive import unpack as run

    _tell(out, run(cache, out, progress=bar), as_json)


def _tell(out: Path, manifest: Manifest, as_json: bool) -> None:
    metrics: dict[str, Any] = {
        "cache": str(out),
        "digest": manifest.digest,
        "images": sum(s.images for s in manifest.shards),
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": sum(f["bytes"] for s in manifest.shards for f in s.files.values()),
    }
    report(metrics, as_json)


def _line(damage: Damage) -> str:
    ids = damage.image_ids
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    images = f"; images {', '.join(map(str, ids[:SHOWN]))}{more}" if ids else ""
    return f"{damage.file}: {damage.kind}: {damage.detail}{images}"


def _verdict(damaged: int) -> str:
    return f"{damaged} damaged" if damaged else "sound"
