"""A search on toy caches: what it decides, that it goes on after a kill, that one seed gives one result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
from typer.testing import CliRunner

from calib.artifact import load
from calib.cache import Cache
from calib.cli.main import app
from calib.errors import ExistsError, FitError, FormatError, SettingError, UnsupportedError
from calib.registry import METHODS
from calib.tune.objective import Objective
from calib.tune.outcome import STACKED, Result, front
from calib.tune.runs import Run, units
from calib.tune.search import Plan, budget_of, tune
from calib.tune.space import read_spaces, with_steps

from .toy import Toy

ROOT = Path(__file__).parents[1]
METHODS_HERE = ("natural", "crt", "tau-norm")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return Toy().write(folder / "train").path, Toy(mode="test").write(folder / "tune").path


def plan(**changed: Any) -> Plan:
    return Plan(
        **({"trials": 14, "methods": METHODS_HERE, "steps": 8, "seeds": 2, "finalists": 2, "stacked": 5} | changed)
    )


def trials(out: Path) -> list[tuple[Any, ...]]:
    """All of the table but the seconds."""
    return duckdb.sql(f"SELECT * EXCLUDE seconds FROM '{out}/trials.parquet'").fetchall()


@pytest.fixture(scope="module")
def study(caches: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return tune(*caches, tmp_path_factory.mktemp("studies") / "one", plan())


def test_a_study_leaves_a_head_to_serve_and_all_trials(study: Result) -> None:
    chosen = study.chosen
    assert chosen.seeds == 2 and chosen == study.candidates[0]
    assert chosen.metrics["AP"] == max(c.metrics["AP"] for c in study.candidates if c.seeds == 2)
    head = load(study.head)
    assert head.info.seed == 0 and head.info.method == ("combine" if chosen.method == "average" else chosen.method)
    rows = duckdb.sql(f"SELECT trial, method, steps, seed, AP FROM '{study.out}/trials.parquet'").fetchall()
    averages = {r[0] for r in rows if r[1] == "average"}
    on_heads = {r[0] for r in rows if r[0] <= -STACKED}
    assert {r[0] for r in rows} - on_heads == set(range(-2 - (len(averages) - 1), 14))
    assert len(on_heads) == 5  # on the one method that is trained to the end
    assert {r[1] for r in rows} == {*METHODS_HERE, "softmax", "average"}
    assert {r[2] for r in rows} == {0, 2, 8}
    whole = [r for r in rows if r[2] == 8 and r[3] == 0 and r[0] >= 0]
    assert len(whole) == 3  # a quarter of the ten that learn
    assert not (study.out / "short").exists()


def test_the_front_holds_what_nothing_beats(study: Result) -> None:
    assert front([(1, 1), (2, 0), (0, 2), (1, 0), (2, 0)]) == [True, True, True, False, True]
    rare, frequent = study.axes
    best = max(study.candidates, key=lambda c: (c.metrics[rare], c.metrics[frequent]))
    assert best.on_front


@pytest.mark.slow
def test_one_seed_gives_one_study_however_many_processes(
    study: Result, caches: tuple[Path, Path], tmp_path: Path, content: Any
) -> None:
    again = tune(*caches, tmp_path / "again", plan(), processes=2)
    assert trials(again.out) == trials(study.out)
    assert content(again.out / "heads") == content(study.out / "heads")
    other = tune(*caches, tmp_path / "other", plan(seed=1))
    assert trials(other.out) != trials(study.out)


def test_a_killed_study_goes_on_to_the_same_end(study: Result, caches: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    options = [
        "--budget",
        "14",
        "--steps",
        "8",
        "--seeds",
        "2",
        "--finalists",
        "2",
        "--stacked",
        "5",
        "--processes",
        "1",
        "--device",
        "cpu",
    ]
    command = ["tune", "--cache", str(caches[0]), "--tune-cache", str(caches[1]), "--out", str(out), *options]
    command += ["--methods", ",".join(METHODS_HERE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for after in ("optuna.journal", "trials.parquet"):
        process = subprocess.Popen([sys.executable, "-m", "calib.cli", *command], env=environment)
        deadline = time.monotonic() + 120
        while not (out / after).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(out / "optuna.journal", "a") as f:
        f.write('{"op_code": 4, "worker')  # what a kill in the midst of writing leaves
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert trials(out) == trials(study.out)
    assert json.loads(done.stdout)["seconds"] > 0


def test_a_larger_budget_goes_on_and_another_plan_is_refused(caches: tuple[Path, Path], tmp_path: Path) -> None:
    first = tune(*caches, tmp_path / "s", plan(trials=3, finalists=1, seeds=1))
    before = trials(first.out)
    tune(*caches, tmp_path / "s", plan(trials=6, finalists=1, seeds=1))
    assert set(before) < set(trials(first.out))
    with pytest.raises(ExistsError, match="other objective, seed"):
        tune(*caches, tmp_path / "s", plan(objective="bAP", seed=4))
    with pytest.raises(ExistsError, match="no study"):
        tune(*caches, caches[0], plan())


def test_a_trial_that_breaks_does_not_end_the_search(caches: tuple[Path, Path], tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text("[natural]\nlr = { choice = [1e30] }\n")
    found = tune(*caches, tmp_path / "s", plan(methods=("natural", "tau-norm"), trials=4, space=space))
    assert found.chosen.method == "tau-norm"
    broken = duckdb.sql(f"SELECT error, AP FROM '{found.out}/trials.parquet' WHERE method = 'natural'").fetchall()
    assert broken and all("natural" in error and ap is None for error, ap in broken)
    with pytest.raises(FitError, match="no trial"):
        tune(*caches, tmp_path / "t", plan(methods=("natural",), trials=2, space=space))


def test_a_condition_comes_before_the_metric() -> None:
    objective = Objective.parse("AP1 subject to AP4>=-0.5 and APf >= -1")
    detector = {"AP1": 0.0, "AP4": 0.60, "APf": 0.5}
    good = objective.value({"AP1": 0.1, "AP4": 0.596, "APf": 0.6}, detector)
    broken = objective.value({"AP1": 0.3, "AP4": 0.59, "APf": 0.6}, detector)
    worse = objective.value({"AP1": 0.4, "AP4": 0.50, "APf": 0.6}, detector)
    assert good == 0.1 and good > broken > worse and broken == pytest.approx(-0.005)
    for text in ("best", "AP1 subject to AP4", "AP1 subject to AP4<=3", "AP1 AP4"):
        with pytest.raises(SettingError):
            Objective.parse(text)
    with pytest.raises(SettingError, match="no APr"):
        Objective.parse("APr").check(detector)


def test_every_method_has_a_space_of_its_own_settings() -> None:
    spaces = read_spaces()
    assert set(spaces) == set(METHODS) == set(read_spaces(on_base=True))
    assert {n for n, s in spaces.items() if not s.learns} == {
        *("softmax", "tau-norm", "ncm", "ms-calibration", "norcal", "logn", "fracal", "discriminant")
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[natural]\nlr = 3\n", "lr is 3"),
        ("[natural]\nlr = { log = [0, 1] }\n", "log above 0"),
        ("[natural]\nrate = { log = [0.1, 1] }\n", "unknown setting 'rate'"),
        ("[natural]\nsampling = { choice = ['none'] }\n", "sampling is 'none'"),
        ("[naturl]\n", "unknown method 'naturl'"),
    ],
)
def test_a_wrong_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_spaces(tmp_path / "space.toml")


def test_trials_of_the_same_batches_stand_together(tmp_path: Path) -> None:
    names = ("natural", "crt", "reweight", "lws")
    runs = [Run(k, m, with_steps(m, {}, 5), 5, 0, tmp_path / str(k)) for k, m in enumerate(names)]
    (together,) = units(runs, 1, tmp_path, tmp_path, 45, "cpu")
    assert sorted(r.method for r in together.runs[:2]) in (["crt", "lws"], ["natural", "reweight"])
    assert len(units(runs, 2, tmp_path, tmp_path, 45, "cpu")) == 4


def test_wrong_plans_are_refused(caches: tuple[Path, Path], tmp_path: Path) -> None:
    assert budget_of("20m") == {"seconds": 1200} and budget_of("7 trials") == {"trials": 7}
    for text in ("", "fast", "-3", "3 d"):
        with pytest.raises(SettingError):
            budget_of(text)
    with pytest.raises(SettingError):
        Plan(trials=3, seconds=4)
    with pytest.raises(UnsupportedError, match="--mode train"):
        tune(caches[0], caches[0], tmp_path / "s", plan())
    with pytest.raises(UnsupportedError, match="different detectors"):
        tune(caches[0], Toy(mode="test", seed=1).write(tmp_path / "x").path, tmp_path / "s", plan())
    assert isinstance(Cache(caches[0]), Cache)


def test_a_budget_in_time_ends(caches: tuple[Path, Path], tmp_path: Path) -> None:
    found = tune(*caches, tmp_path / "s", plan(trials=None, seconds=1.0))
    assert found.chosen.metrics["AP"] >= found.detector["AP"]
    assert {m for (m,) in duckdb.sql(f"SELECT DISTINCT method FROM '{found.out}/trials.parquet'").fetchall()} > {
        *METHODS_HERE
    }
