"""A study on any data set: a detector per seed, a better head for each, and one table.

    python studies/run.py --train train.json --tune tune.json --test val.json --images pictures --out study
    python studies/run.py --train train.json --tune tune.json --test val.json --images pages --size 288 --out study
    python studies/run.py --quick --out quick      # a few rendered pictures, to see that it works

For every seed a small detector is trained on TRAIN (data/train_detector.py), and ``calib improve`` searches a head on
TUNE. All heads are judged on TEST, with intervals of a bootstrap over its pictures. With ``--size`` pictures are cut
into tiles before, and detections are put together to judge them on whole pages; what was found on tiles stands in
improved/table.md. Heads with fixed settings come with --search "--table FILE.toml --seeds 3". All is done by the
commands that stand in commands.sh, each of which is whole or not there: killed, the same command goes on.

    OUT/tiles/  OUT/seed-0/{detector.safetensors,log.json,improved/,pages/,results/}  OUT/table.json  OUT/table.md
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from calib.analysis import ask
from calib.cli.console import exit_code
from calib.errors import ExistsError, ProcessError, SettingError
from calib.files import read_json, require, write_json, write_text
from calib.layout import SUMMARY

CONTROLS = ("natural-converged", "control")  # of calib improve: what the other heads are compared with
GAINS = ("AP", "AP1", "AP2", "AP3", "AP4")
METRICS = (*GAINS, "AP50", "APr", "APc", "APf")
SPLITS = ("train", "tune", "test")
TRAINER = Path(__file__).parents[1] / "data" / "train_detector.py"


@dataclass(frozen=True)
class Study:
    """What is asked for. ``tiles`` (none: whole pictures), ``training`` and ``search`` are options of ``calib data
    tile``, of the trainer and of ``calib improve``; ``cap`` and ``metric`` are of a page's detections, ``bootstrap`` is
    the number of replicates behind their intervals."""

    train: Path
    tune: Path
    test: Path
    images: Path
    tiles: tuple[str, ...]
    training: tuple[str, ...]
    search: tuple[str, ...]
    seeds: int
    cap: int
    metric: str
    bootstrap: int = 1000

    def json_of(self, split: str) -> Path:
        """The annotation file of the whole pictures."""
        return Path(getattr(self, split))

    def inputs(self, out: Path) -> tuple[dict[str, Path], Path]:
        """What the detector sees: annotation files by split, and the folder of pictures; tiles lie in ``out``."""
        if not self.tiles:
            return {split: self.json_of(split) for split in SPLITS}, self.images
        return {split: out / "tiles" / f"{split}.json" for split in SPLITS}, out / "tiles" / "images"


def quick(out: Path, seeds: int) -> Study:
    """A rendered set of a few pictures, and the shortest of everything."""
    data = out / "data"
    if not (data / "val.json").exists():
        _calib("data", "shapes", "--out", data, "--categories", 6, "--images", 16, "--val-per-category", 4)
    return Study(
        *(data / f"{name}.json" for name in ("train", "tune", "val")),
        data / "images",
        ("--size", "96", "--overlap", "40"),
        ("--epochs", "1", "--batch", "4", "--last-layer-steps", "20"),
        ("--budget", "1", "--methods", "logit-adjustment", "--steps", "10", "--bootstrap", "10", "--no-doctor"),
        seeds,
        300,
        "iou",
        10,
    )


def run(study: Study, out: Path) -> list[dict[str, Any]]:
    """Do what is not done yet; returns the rows of the table.

    Raises:
        ExistsError: ``out`` is of another study. MissingFileError: an input is not there. ProcessError: a command
            failed.
    """
    for path in (study.train, study.tune, study.test, study.images):
        require(path, "input of the study")
    _begin(study, out)
    for split in SPLITS if study.tiles else ():
        _cut(study, out, split)
    for seed in range(study.seeds):
        _one(study, out, out / f"seed-{seed}", seed)
    rows = list(_rows(study, out))
    write_json(out / "table.json", rows)
    write_text(out / "table.md", _markdown(rows))
    return rows


def _begin(study: Study, out: Path) -> None:
    about, asked = out / "study.json", json.loads(json.dumps(asdict(study) | {"seeds": None}, default=str))
    if about.exists() and read_json(about, "study") != asked:
        raise ExistsError(f"{out} is of another study", hint="only --seeds may change: choose another --out")
    write_json(about, asked)


def _cut(study: Study, out: Path, split: str) -> None:
    """Tiles of one split; of train they have their own counts."""
    if not (out / "tiles" / f"{split}.json").exists():
        more = ("--recount", "--empty", "0") if split == "train" else ()
        given = ("--images", study.images, "--name", split, "--out", out / "tiles", *study.tiles, *more)
        _calib("data", "tile", study.json_of(split), *given, log=out)


def _one(study: Study, out: Path, folder: Path, seed: int) -> None:
    """A detector, its heads, and what they find on TEST."""
    (splits, images), detector = study.inputs(out), folder / "detector.safetensors"
    if not detector.exists():
        given = ("--annotations", splits["train"], "--tune", splits["tune"], "--images", images)
        named = ("--seed", seed, "--out", detector, "--log", folder / "log.json")
        _do(sys.executable, TRAINER, *given, *named, *study.training, log=out)
    files = [word for split, path in splits.items() for word in (f"--{split}", path)]
    given = ("--detector", f"torchvision:{detector}", *files, "--images", images, "--seed", seed)
    _calib("improve", *given, "--out", folder / "improved", *study.search, log=out)
    _judge(study, out, folder)


def _judge(study: Study, out: Path, folder: Path) -> None:
    """What all heads find on TEST, the control first; of tiles put together before."""
    runs = sorted((folder / "improved" / "detections").glob("*.parquet"))
    control = _control([run.stem for run in runs])
    runs.sort(key=lambda run: run.stem != control)
    if study.tiles:
        tiles = ("--tiles", out / "tiles" / "test.json", "--metric", study.metric)
        for run in runs:
            _calib("data", "untile", run, *tiles, "--out", folder / "pages" / run.name, log=out)
        runs = [folder / "pages" / run.name for run in runs]
    results = [word for run in runs for word in ("--results", run)]
    style = ("--max-detections", study.cap) if _is_federated(study.test) else ("--style", "coco")
    more = ("--bootstrap", study.bootstrap, "--fixed-ap", "--calibration", *style)
    _calib("evaluate", "--annotations", study.test, *results, *more, "--out", folder / "results", log=out)


def _control(names: Sequence[str]) -> str:
    return next(name for name in CONTROLS if name in names)


def _is_federated(path: Path) -> bool:
    images = read_json(path, "annotation file")["images"]
    return any("neg_category_ids" in image for image in images)


def _rows(study: Study, out: Path) -> Iterator[dict[str, Any]]:
    """In percent, over seeds of detector and head: means, the deviation of AP (-1 of a single run), gains over the
    control of the same detector with the lowest and the highest end of their intervals."""
    seeds = [_judged(out / f"seed-{seed}" / "results") for seed in range(study.seeds)]
    for head in seeds[0]:
        found = [one for runs in seeds for one in runs[head]]
        row: dict[str, Any] = {"head": head, "runs": len(found)}
        row |= {key: round(mean(one[key] for one in found), 2) for key in found[0] if key != "gain"}
        row["AP deviation"] = round(stdev(one["AP"] for one in found), 2) if len(found) > 1 else -1
        yield row | {f"gain {key}": gain for key in GAINS if (gain := _gain([one["gain"].get(key) for one in found]))}


def _gain(found: list[dict[str, float] | None]) -> str:
    """Empty where the head is the control, or the split has no such category."""
    known = [one for one in found if one is not None]
    if not known:
        return ""
    low, high = min(one["low"] for one in known), max(one["high"] for one in known)
    return f"{100 * mean(one['difference'] for one in known):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _judged(results: Path) -> dict[str, list[dict[str, Any]]]:
    """What was found with one detector, by head; of a head with several seeds, one after the other."""
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    at_half = ask(folders, "ap_per_bin").records()
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        own = read_json(folder / SUMMARY, "summary")
        row = {key: _percent(own.get(key)) for key in METRICS}
        row |= {f"AP50-{one['bin']}": _percent(one["AP50"]) for one in at_half if one["run"] == folder.name}
        row |= {f"{key} fixed": _percent(own["fixed"].get(key)) for key in ("AP", "AP1")}
        row |= {"D-ECE": _percent(own["calibration"]["D-ECE"]), "gain": own.get("difference", {})}
        found.setdefault(folder.name.partition("-seed")[0], []).append(row)
    return found


def _percent(share: float | None) -> float:
    """-1 where no category has it."""
    return -1 if share is None or share == -1 else 100 * share


def _markdown(rows: list[dict[str, Any]]) -> str:
    """All rows have the columns of the fullest one."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    head = f"| {' | '.join(keys)} |\n| {' | '.join('---' for _ in keys)} |\n"
    return head + "".join(f"| {' | '.join(str(row.get(key, '')) for key in keys)} |\n" for row in rows)


def _calib(*words: object, log: Path | None = None) -> None:
    _do(sys.executable, "-m", "calib.cli", *words, log=log)


def _do(*words: object, log: Path | None = None) -> None:
    """One command, which is added to OUT/commands.sh."""
    command = [str(word) for word in words]
    print(shlex.join(command), file=sys.stderr)
    if log is not None:
        _note(log / "commands.sh", shlex.join(command))
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise ProcessError(f"a command of the study ended with code {code}", hint=shlex.join(command))


def _note(path: Path, line: str) -> None:
    """Add a line that is not there."""
    before = path.read_text() if path.exists() else ""
    if line not in before.splitlines():
        write_text(path, f"{before}{line}\n")


def _study(args: argparse.Namespace) -> Study:
    if args.quick:
        return quick(args.out, args.seeds)
    inputs = (args.train, args.tune, args.test, args.images)
    if None in inputs:
        raise SettingError("give --train, --tune, --test and --images, or --quick", hint="see --help")
    cut = ("--size", args.size, "--overlap", args.overlap, "--scale", args.scale, "--min-visible", args.min_visible)
    tiles = tuple(map(str, cut)) if args.size is not None else ()
    more = (shlex.split(args.training), shlex.split(args.search))
    return Study(*inputs, tiles, *map(tuple, more), args.seeds, args.cap, args.metric, args.bootstrap)


def main() -> int:
    """Exit code 0, or 2 with what to mend on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*SPLITS, "images"):
        parser.add_argument(
            f"--{name}", type=Path, help="the pictures of all" if name == "images" else "LVIS or COCO json"
        )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument("--seeds", type=int, default=1, help="detectors; more may be asked for later (%(default)s)")
    parser.add_argument("--size", type=int, help="side of the tiles [default: whole pictures]")
    parser.add_argument("--overlap", type=int, default=32, help="of neighbouring tiles (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the pages (%(default)s)")
    parser.add_argument("--min-visible", type=float, default=0.5, help="share of a box that is kept (%(default)s)")
    parser.add_argument("--training", default="", help='options of data/train_detector.py: "--epochs 8 --no-mirror"')
    parser.add_argument("--search", default="", help='options of calib improve: "--budget 1h"')
    parser.add_argument("--cap", type=int, default=1000, help="detections of a page that are judged (%(default)s)")
    parser.add_argument("--metric", choices=("iou", "ios"), default="iou", help="between tiles (%(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates over pages (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a rendered set and the shortest of everything")
    args = parser.parse_args()
    return exit_code(lambda: print(_markdown(run(_study(args), args.out)), end=""))


if __name__ == "__main__":
    sys.exit(main())
