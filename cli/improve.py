"""``calib improve``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from calib.improve.summary import Summary

_Detector = Annotated[str, typer.Option(help="as calib extract takes it: torchvision:CHECKPOINT.safetensors, ...")]
_Train = Annotated[Path, typer.Option(help="TRAIN json: heads are trained on it, its counts sort categories into bins")]
_Images = Annotated[Path, typer.Option(help="folder of pictures of all annotation files")]
_Out = Annotated[Path, typer.Option(help="folder to write, or to go on with")]
_Val = Annotated[
    Path | None, typer.Option(help="json to judge on; without --tune it is also what is chosen on, by folds")
]
_Tune = Annotated[Path | None, typer.Option(help="json to choose on")]
_Test = Annotated[Path | None, typer.Option(help="json to judge on, beside --tune: the same as --val there")]
_Weights = Annotated[Path | None, typer.Option(help="state dict for a factory (.safetensors or .pth)")]
_DetectorArgs = Annotated[str, typer.Option(help="JSON object of arguments for a factory")]
_Budget = Annotated[str, typer.Option(help="of the search: wall time (90s, 30m, 2h) or a number of trials (40)")]
_Objective = Annotated[
    str, typer.Option(help='AP, bAP, AP1 ..., or "AP1 subject to AP4>=-0.5": points of change to the detector')
]
_Methods = Annotated[str, typer.Option(help="all, or names: crt,bags,seesaw")]
_Steps = Annotated[int, typer.Option(help="length of whole trainings; trials begin with a quarter of it")]
_Folds = Annotated[int, typer.Option(help="of --val: 2 to 10; each costs a search")]
_GroupBy = Annotated[
    str,
    typer.Option(metavar="FIELD[:REGEX]", help="of --val: images with the same value stay together (calib data split)"),
]
_Bootstrap = Annotated[int, typer.Option(help="replicates behind the 95 % intervals")]
_MaxDetections = Annotated[
    int | None, typer.Option(min=1, help="per image, to choose and to judge at [default: the detector's]")
]
_Table = Annotated[
    Path | None,
    typer.Option(help="TOML of heads with fixed settings, to be judged beside: RUN/table.md (docs/improve.md)"),
]
_Seeds = Annotated[int, typer.Option(min=1, help="of the learned heads of --table, for a spread")]
_Caps = Annotated[str, typer.Option(help="detections per image that --table is judged at: 300,100 [default: one]")]
_NoDoctor = Annotated[bool, typer.Option("--no-doctor", help="do not look at data and detector first (calib doctor)")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]
_Processes = Annotated[int | None, typer.Option(min=1, help="processes of the search [default: cores; 1 with a GPU]")]
_Seed = Annotated[int, typer.Option(min=0, help="of folds, search and trainings")]
_Plan = Annotated[bool, typer.Option("--plan", help="print steps, sizes and about how long they take; write nothing")]
_AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def improve(
    detector: _Detector,
    train: _Train,
    images: _Images,
    out: _Out,
    val: _Val = None,
    tune: _Tune = None,
    test: _Test = None,
    weights: _Weights = None,
    detector_args: _DetectorArgs = "",
    budget: _Budget = "30m",
    objective: _Objective = "AP",
    methods: _Methods = "all",
    steps: _Steps = 4500,
    folds: _Folds = 2,
    group_by: _GroupBy = "",
    max_detections: _MaxDetections = None,
    bootstrap: _Bootstrap = 1000,
    table: _Table = None,
    seeds: _Seeds = 1,
    caps: _Caps = "",
    no_doctor: _NoDoctor = False,
    device: _Device = "auto",
    processes: _Processes = None,
    seed: _Seed = 0,
    plan: _Plan = False,
    as_json: _AsJson = False,
) -> None:
    """From a trained detector to a better head: extract, search, choose, calibrate, judge.

    Examples:

    calib improve --detector torchvision:detector.safetensors --train train.json --tune tune.json --test test.json
    --images images --out run

    calib improve --detector torchvision:detector.safetensors --train train.json --val val.json --images images
    --out run --budget 40

    RUN/models is ready for calib serve (detector, control, chosen, chosen-calibrated), RUN/export has the chosen head
    for use without calib, RUN/report.html the page, RUN/summary.json all metrics, RUN/commands.sh the single commands.
    Killed, the same command goes on; with other arguments only what depends on them is done again.
    """
    from calib.errors import SettingError
    from calib.improve.entries import read_entries
    from calib.improve.estimate import estimate
    from calib.improve.improve import improve as run
    from calib.improve.request import Data, Frozen, HeadTable, Request, Search
    from calib.parallel.devices import choose_device

    from .console import bar, cores, show, tell

    if table is None and (caps or seeds > 1):
        raise SettingError("--caps and --seeds are of a table of heads", hint="add --table FILE.toml")
    request = Request(
        Frozen(detector, weights, detector_args),
        Data(train, images, _judged_on(val, tune, test), tune),
        out,
        Search(
            budget,
            objective,
            () if methods == "all" else tuple(m.strip() for m in methods.split(",") if m.strip()),
            steps,
            seed=seed,
            max_detections=max_detections,
        ),
        folds,
        group_by,
        bootstrap,
        device,
        processes or (cores() if choose_device(device).type == "cpu" else 1),
        not no_doctor,
        None if table is None else HeadTable(tuple(read_entries(table)), seeds, _numbers(caps)),
    )
    if plan:
        found = estimate(request)
        show([found], found.record(), as_json)
        return
    _tell(run(request, progress=bar, note=tell), as_json)


def _judged_on(val: Path | None, tune: Path | None, test: Path | None) -> Path:
    """
    Raises:
        SettingError: neither or both of --val and --test are given, or --test without --tune.
    """
    from calib.errors import SettingError

    found = val or test
    if found is None or (val and test) or (test and not tune):
        hint = "give --tune and --test, or --val alone: it is then divided into folds"
        raise SettingError("a head is chosen on one split and judged on another", hint=hint)
    return found


def _numbers(text: str) -> tuple[int, ...]:
    from calib.errors import SettingError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingError(f"caps are '{text}': expected whole numbers", hint="--caps 300,100") from None


def _tell(summary: "Summary", as_json: bool) -> None:
    import shlex

    from calib.layout import RunFolder

    from .console import show, tell

    show([summary], summary.record, as_json)
    for warning in summary.record["warnings"]:
        tell(f"warning: {warning}")
    if as_json:
        return
    run = RunFolder(summary.out)
    print("\n".join(summary.record["conclusions"]))
    print(f"calib serve --models {shlex.quote(str(run.models))}   (its model {summary.record['serve']})")
    if summary.record["judged"] != "chosen":
        print(f"export: {run.export} has models/chosen, whose scores are not calibrated")
    print(f"report: {run.report}")
