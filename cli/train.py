"""``calib train``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import path_or_url

if TYPE_CHECKING:
    from calib.artifact import Artifact
    from calib.train.together import Request


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
    nproc: Annotated[
        int, typer.Option(help="processes that share the rows of every step; with --one-pass each takes some heads")
    ] = 1,
    hold: Annotated[
        bool, typer.Option("--hold", help="keep all features in the memory of --device, where they fit")
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

    calib train bags --nproc 2 --cache caches/train --out models/bags/1

    torchrun --nnodes 2 --nproc-per-node 8 -m calib.cli train bags --cache caches/train --out models/bags/1

    calib train natural bags crt --one-pass --device cuda --hold --cache caches/train --out models

    An interrupted training goes on from its last checkpoint when the same command is run again.
    """
    from calib.errors import SettingError
    from calib.settings import parse_assignments, read_toml

    from .console import bar, report

    overrides = (read_toml(config) if config else {}) | parse_assignments(assignments or [])
    how: dict[str, Any] = {"seed": seed, "device": device, "overwrite": overwrite, "progress": bar, "hold": hold}
    if one_pass and (tune is not None or choose is not None):
        raise SettingError("--choose is for one method, not for --one-pass")
    if one_pass:
        for place, trained in _in_one_pass(nproc, methods, cache, out, overrides, base, how).items():
            report(_figures(trained, place), as_json)
        return
    if len(methods) > 1:
        raise SettingError(f"{len(methods)} methods: expected one", hint="--one-pass trains several")
    artifact, tried = _alone(nproc, methods[0], cache, out, overrides, base, tune, choose, how)
    if artifact is not None:
        report(_figures(artifact, out) | tried, as_json)


def _in_one_pass(
    nproc: int,
    methods: list[str],
    cache: Path,
    out: str,
    overrides: dict[str, Any],
    base: str | None,
    how: dict[str, Any],
) -> "dict[str, Artifact]":
    """The heads by their places."""
    from calib.storage import writing
    from calib.train.one_pass import VERSION, divide
    from calib.train.together import deal

    from .console import bar, tell

    divide(methods, overrides)  # what is wrong with them is said before a base is fitted
    with writing(out, progress=bar) as place, _below(nproc, base, methods, cache, place, how) as below:
        heads = deal(nproc, methods, cache, place, overrides, base=below, **how, note=tell)
    return {f"{out.rstrip('/')}/{name}/{VERSION}": trained for name, trained in heads.items()}


def _alone(
    nproc: int,
    method: str,
    cache: Path,
    out: str,
    overrides: dict[str, Any],
    base: str | None,
    tune: Path | None,
    choose: str | None,
    how: dict[str, Any],
) -> "tuple[Artifact | None, dict[str, Any]]":
    """The head, and what --choose has tried."""
    from calib.artifact import check_free
    from calib.errors import UnsupportedError
    from calib.parallel.distributed import ranks
    from calib.storage import Remote, parse, writing
    from calib.train import settings_of
    from calib.train.together import Request

    from .console import bar

    if ranks() > 1 and isinstance(parse(out), Remote):
        raise UnsupportedError(f"{out}: the processes of torchrun write to a folder", hint="or use --nproc")
    settings_of(method, overrides, how["seed"])
    with writing(out, progress=bar) as place:
        if base is not None:
            check_free(place, overwrite=how["overwrite"])
        with _below(nproc, base, [method], cache, place, how) as below:
            tried = _chosen(method, cache, tune, choose, overrides, below, how["seed"])
            return _trained(nproc, Request(method, cache, place, overrides, base=below, **how)), tried


@contextmanager
def _below(
    nproc: int, base: str | None, methods: list[str], cache: Path, place: Path, how: dict[str, Any]
) -> Iterator[Path | None]:
    """The folder of the base."""
    if base is None:
        yield None
        return
    from calib.cache import Cache
    from calib.errors import SettingError
    from calib.parallel.distributed import ranks
    from calib.train.base import method_of, opened_base
    from calib.train.together import Request

    if ranks() > 1 and method_of(base) is not None:
        raise SettingError(f"base {base} is not fitted yet", hint="under torchrun a base is a folder: train it first")

    def fit(name: str, own: Mapping[str, Any], folder: Path) -> "Artifact | None":
        return _trained(nproc, Request(name, cache, folder, own, **how | {"overwrite": True}))

    with opened_base(base, methods, Cache(cache), place, how["seed"], fit) as below:
        yield below


def _trained(nproc: int, request: "Request") -> "Artifact | None":
    """The head; None in a process of torchrun that is not the first."""
    from calib.errors import SettingError
    from calib.parallel.distributed import ranks
    from calib.train.together import train_as_rank, train_together

    if ranks() == 1:
        return train_together(nproc, request)
    if nproc > 1:
        raise SettingError("torchrun has started the processes already", hint="leave --nproc out")
    return train_as_rank(request)


def _figures(artifact: "Artifact", out: str) -> dict[str, Any]:
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
    tune: Path | None,
    choose: str | None,
    overrides: dict[str, Any],
    base: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Put the best value of --choose into ``overrides``; what was tried, for the report."""
    from calib.errors import SettingError

    if (tune is None) != (choose is None):
        raise SettingError("--tune and --choose belong together", hint="--tune CACHE --choose tau=0.3,0.5,0.7")
    if tune is None or choose is None:
        return {}
    from calib.artifact import load
    from calib.cache import Cache
    from calib.decide.choose import choose as run
    from calib.settings import parse_assignments

    key, values = next(iter(parse_assignments([choose]).items()))
    below, tried = None if base is None else load(base), [v for v in values.split(",") if v]
    choice = run(method, Cache(cache), Cache(tune), key, tried, overrides, base=below, seed=seed)
    overrides[key] = choice.value
    return {"chosen": {key: choice.value}, "AP_on_tune": choice.tried}
