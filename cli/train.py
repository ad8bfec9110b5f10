"""``calib train``."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import path_or_url

if TYPE_CHECKING:
    from calib.artifact import Artifact


_Out = Annotated[
    str,
    typer.Option(
        metavar="<path or URL>",
        help="head folder to write, MODELS/NAME/VERSION; with --one-pass MODELS, heads in METHOD/1",
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="<head or METHOD[:key=value...]>",
        help="fitted head to build on, in place of the detector's classifier; a method is fitted first",
    ),
]
_Tune = Annotated[
    Path | None,
    typer.Option(parser=path_or_url, help="labelled cache extracted with --mode test, for --choose"),
]


def train(
    methods: Annotated[
        list[str], typer.Argument(metavar="METHOD...", help="a method of `calib methods`; several with --one-pass")
    ],
    cache: Annotated[Path, typer.Option(parser=path_or_url, help="cache extracted with --mode train")],
    out: _Out,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="key=value, repeatable; `calib methods METHOD` lists keys; METHOD.key=value with --one-pass"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; --set goes before it")] = None,
    base: _Base = None,
    tune: _Tune = None,
    choose: Annotated[
        str | None, typer.Option(help="key=a,b,c: take the value with the highest AP on the --tune cache")
    ] = None,
    seed: Annotated[int, typer.Option(help="of initialisation and sampling")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    processes: Annotated[
        int, typer.Option(help="processes that share the rows of every step; with --one-pass each takes some heads")
    ] = 1,
    preload: Annotated[
        bool, typer.Option("--preload", help="keep all features in the memory of --device, where they fit")
    ] = False,
    one_pass: Annotated[
        bool, typer.Option("--one-pass", help="train several methods; those with the same batches read them once")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, per head")] = False,
) -> None:
    """Fit a calibration head on a feature cache.

    Examples:

    calib train bags --cache caches/train --out models/bags/1

    calib train tau-norm --cache caches/train --out models/tau/1 --tune caches/tune --choose tau=0.3,0.5,0.7,0.9

    calib train natural bags crt --one-pass --set steps=200 --set bags.beta=4 --cache caches/train --out models

    calib train logit-adjustment --base models/natural/1 --cache caches/train --out models/adjusted/1 --set tau=0.75

    calib train norcal --base natural:steps=2000:lr=0.1 --cache caches/train --out models/norcal/1

    calib train bags --processes 2 --cache caches/train --out models/bags/1

    torchrun --nproc-per-node 8 -m calib.cli train bags --cache caches/train --out models/bags/1

    calib train natural bags crt --one-pass --device cuda --preload --cache caches/train --out models

    An interrupted training goes on from its last checkpoint when the same command is run again.
    """
    from calib.layout import FIRST
    from calib.parallel.distributed import rank
    from calib.settings import parse_assignments, read_toml
    from calib.storage import writing
    from calib.training import train as run

    from .console import bar, report, tell

    overrides = (read_toml(config) if config else {}) | parse_assignments(assignments or [])
    how: dict[str, Any] = {"seed": seed, "device": device, "processes": processes, "preload": preload, "progress": bar}
    how |= {"base": base, "overwrite": overwrite}
    _check(methods, out, one_pass=one_pass, chooses=tune is not None or choose is not None)
    tried: dict[str, Any] = {}
    with writing(out, progress=bar) as place:
        if one_pass:
            heads = run(methods, cache, place, overrides, note=tell, **how)
        elif choose is None and tune is None:
            artifact = run(methods[0], cache, place, overrides, **how)
        else:
            artifact, tried = _chosen(methods[0], cache, place, overrides, tune, choose, how)
    if one_pass:
        for name, head in heads.items():
            report(_summary(head, f"{out.rstrip('/')}/{name}/{FIRST}"), as_json)
    elif rank() == 0:
        report(_summary(artifact, out) | tried, as_json)


def _check(methods: list[str], out: str, *, one_pass: bool, chooses: bool) -> None:
    """What the library cannot know of the options."""
    from calib.errors import SettingError, UnsupportedError
    from calib.parallel.distributed import ranks
    from calib.storage import Remote, parse

    if one_pass and chooses:
        raise SettingError("--choose is for one method, not for --one-pass")
    if not one_pass and len(methods) > 1:
        raise SettingError(f"{len(methods)} methods: expected one", hint="--one-pass trains several")
    if ranks() > 1 and isinstance(parse(out), Remote):
        raise UnsupportedError(f"{out}: the processes of torchrun write to a folder", hint="or use --processes")


def _summary(artifact: "Artifact", out: str) -> dict[str, Any]:
    info = artifact.info
    return {
        "head": out,
        "method": info.method,
        "seed": info.seed,
        "processes": info.processes,
        "classes": artifact.head.num_classes,
        "final_loss": info.losses[-1][1] if info.losses else None,
        "settings": info.settings,
    } | ({"base": info.base} if info.base else {})


def _chosen(
    method: str,
    cache: Path,
    out: Path,
    overrides: dict[str, Any],
    tune: Path | None,
    choose: str | None,
    how: dict[str, Any],
) -> "tuple[Artifact, dict[str, Any]]":
    """The head with the best value of --choose, and what was tried."""
    from calib.errors import SettingError

    if tune is None or choose is None:
        raise SettingError("--tune and --choose belong together", hint="--tune CACHE --choose tau=0.3,0.5,0.7")
    from calib.artifact import check_free, load
    from calib.cache import Cache
    from calib.decide.choose import choose as run
    from calib.settings import parse_assignments
    from calib.training import settings_of, train
    from calib.training.runner import fitted_base

    seed, base, overwrite = how["seed"], how["base"], how["overwrite"]
    how = {k: v for k, v in how.items() if k not in ("base", "overwrite")}
    settings_of(method, overrides, seed)
    check_free(out, overwrite=overwrite)
    key, values = next(iter(parse_assignments([choose]).items()))
    with nullcontext(None) if base is None else fitted_base(base, [method], cache, out, **how) as folder:
        below = None if folder is None else load(folder)
        candidates = [v for v in values.split(",") if v]
        choice = run(method, Cache(cache), Cache(tune), key, candidates, overrides, base=below, seed=seed)
        best = {**overrides, key: choice.value}
        artifact = train(method, cache, out, best, base=below, overwrite=overwrite, **how)
    return artifact, {"chosen": {key: choice.value}, "AP_on_tune": choice.tried}
