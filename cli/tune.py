"""``calib tune``."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from calib.tune.outcome import Result
    from calib.tune.plan import Plan

_Base = Annotated[
    str | None,
    typer.Option(
        metavar="<head or METHOD[:key=value...]>",
        help="fitted head that all trials are built on, in place of the detector's classifier",
    ),
]


def tune(
    cache: Annotated[Path, typer.Option(help="cache to train on, extracted with --mode train")],
    tune_cache: Annotated[Path, typer.Option(help="labelled cache to judge on, extracted with --mode test; never val")],
    out: Annotated[Path, typer.Option(help="study folder to write, or to go on with")],
    methods: Annotated[str, typer.Option(help="all, or names: crt,bags,seesaw")] = "all",
    budget: Annotated[str, typer.Option(help="wall time (90s, 20m, 2h) or a number of trials (100)")] = "20m",
    objective: Annotated[
        str, typer.Option(help='AP, bAP, AP1 ..., or "AP1 subject to AP4>=-0.5": points of change to the detector')
    ] = "AP",
    steps: Annotated[int, typer.Option(help="length of whole trainings; trials begin with a quarter of it")] = 4500,
    finalists: Annotated[int, typer.Option(help="of the best heads, trained from several seeds")] = 3,
    seeds: Annotated[int, typer.Option(help="of every finalist")] = 3,
    base: _Base = None,
    bases: Annotated[
        int, typer.Option(help="best learned heads, on each of which the methods that only transform scores are tried")
    ] = 3,
    stacked: Annotated[int, typer.Option(help="trials on each of them; nothing is trained in one")] = 36,
    average: Annotated[
        bool, typer.Option("--average/--no-average", help="averages of two heads take part: they cost both in serving")
    ] = True,
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    space: Annotated[Path | None, typer.Option(help="TOML file of search spaces, instead of calib's own")] = None,
    seed: Annotated[int, typer.Option(help="of the search and of the trainings")] = 0,
    processes: Annotated[int | None, typer.Option(help="processes [default: cores; 1 with a GPU]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Search methods and settings on a tune split and choose a head.

    Examples:

    calib tune --cache caches/train --tune-cache caches/tune --budget 20m --out studies/first

    calib tune --cache caches/train --tune-cache caches/tune --methods crt,bags --budget 60 --out studies/rare
    --objective "AP1 subject to AP4>=-0.5"

    calib tune --cache caches/train --tune-cache caches/tune --methods discriminant --base models/natural/1 --budget 40
    --out studies/on-natural

    Trials are drawn by Optuna and trained briefly, several from one reading of the cache; the best quarter is trained
    to the end. On the best of these logit adjustment, FRACAL, the discriminant head and their like are tried, and the
    best of all are trained from several seeds. STUDY/models/chosen/1 is ready to serve, STUDY/heads has every
    head that was trained to the end, STUDY/trials.parquet every training. Killed, the same command goes on; with a
    larger budget it goes on from where it ended. With a number of trials, one seed gives one result.
    """
    from calib.tune.search import Plan, budget_of

    plan = Plan(
        objective=objective,
        methods=() if methods == "all" else tuple(m.strip() for m in methods.split(",") if m.strip()),
        **budget_of(budget),
        steps=steps,
        finalists=finalists,
        seeds=seeds,
        bases=bases,
        stacked=stacked,
        average=average,
        seed=seed,
        max_detections=max_detections,
        space=space,
    )
    _tell(_searched(cache, tune_cache, out, plan, base, processes, device), as_json)


def _searched(
    cache: Path, tune_cache: Path, out: Path, plan: "Plan", base: str | None, processes: int | None, device: str
) -> "Result":
    from calib.parallel.devices import choose_device
    from calib.training.runner import fitted_base
    from calib.tune.search import tune as run

    from .console import bar, cores

    where = choose_device(device)
    how = {"seed": plan.seed, "device": where, "progress": bar}
    with nullcontext(None) if base is None else fitted_base(base, plan.methods, cache, out, **how) as below:
        return run(
            cache,
            tune_cache,
            out,
            replace(plan, base=below),
            processes=processes or (cores() if where.type == "cpu" else 1),
            device=str(where),
            progress=bar,
            note=lambda line: typer.echo(line, err=True),
        )


def _tell(result: "Result", as_json: bool) -> None:
    from calib.tune.outcome import name_of

    from .console import show, tell

    show([result], result.record(), as_json)
    if as_json:
        return
    chosen = result.chosen
    print(f"chosen: trial {name_of(chosen.trial)}, {chosen.label}")
    if not result.is_gain:
        tell("note: it is no better than the unchanged detector on the tune split: keep the detector, or search longer")
    for link in ({"trial": name_of(chosen.trial), "method": chosen.method, "settings": chosen.settings}, *chosen.chain):
        settings = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in link["settings"].items())
        print(f"  {link.get('trial', 'base')}: {' '.join([link['method'], *settings])}")
    print(f"head: {result.head}")
