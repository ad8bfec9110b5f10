"""Searches over what is built on a fitted head: chains are those of ``calib train --base``, and survive a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest
from typer.testing import CliRunner

from calib import registry
from calib.artifact import load
from calib.cache import Cache
from calib.cli.main import app
from calib.decide.assess import Assessment
from calib.decide.on_base import OnBase
from calib.errors import UnsupportedError
from calib.evaluate import Rescored
from calib.registry import METHODS, MethodInfo
from calib.score import detector_nms
from calib.settings import has_key
from calib.training import settings_of, train
from calib.tune.outcome import AVERAGE, Candidate, Result, name_of, number_on
from calib.tune.search import Plan, tune
from calib.tune.space import Space, read_spaces, with_steps

from .toy import Toy

ROOT = Path(__file__).parents[1]
METHODS_HERE = ("natural", "residual", "logit-adjustment", "norcal", "discriminant", "tau-norm")
OPTIONS = {"trials": 12, "steps": 40, "seeds": 2, "finalists": 3, "bases": 2, "stacked": 12}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return Toy().write(folder / "train").path, Toy(mode="test").write(folder / "tune").path


@pytest.fixture(scope="module")
def study(caches: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("studies") / "one"
    return tune(*caches, out, Plan(**OPTIONS, methods=METHODS_HERE, average=False))


@pytest.fixture(scope="module")
def base(caches: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "1"
    train("natural", caches[0], out, {"steps": 30, "warmup_steps": 0, "lr": 0.1})
    return out


def test_every_method_that_only_transforms_is_tried_on_the_best_trained_heads(study: Result) -> None:
    table = f"'{study.out}/trials.parquet'"
    wanted = "name, base, method, steps, AP"
    rows = duckdb.sql(f"SELECT {wanted} FROM {table} WHERE base IS NOT NULL").fetchall()
    bases = {base for _, base, *_ in rows}
    learned = dict(duckdb.sql(f"SELECT trial, method FROM {table} WHERE steps = 40 AND seed = 0").fetchall())
    assert bases <= set(learned) and len({learned[b] for b in bases}) == len(bases) == 2
    for b in bases:
        own = {name: (method, ap) for name, of, method, steps, ap in rows if of == b and steps == 0}
        assert {method for method, _ in own.values()} == {"logit-adjustment", "norcal", "discriminant", "tau-norm"}
        assert set(own) == {f"{b}.{k}" for k in range(12)}
        failed = {method for method, ap in own.values() if ap is None}
        assert failed == ({"tau-norm"} if learned[b] == "residual" else set())


def test_a_chain_is_what_train_writes_on_the_same_base(
    study: Result, caches: tuple[Path, Path], tmp_path: Path, content: Any
) -> None:
    chains = [c for c in study.candidates if c.chain and c.seeds == 2]
    assert chains
    for c in chains:
        (link,) = c.chain
        for version in (1, 2):
            written = study.out / "heads" / name_of(c.trial) / str(version)
            below = study.out / "heads" / link["trial"] / str(version)
            again = tmp_path / name_of(c.trial) / str(version)
            train(c.method, caches[0], again, c.settings, base=below, seed=version - 1)
            assert content(again) == content(written)
            assert [b["method"] for b in load(written).info.base] == [link["method"]]
    kept = {p.name for p in (study.out / "heads").iterdir() if "." in p.name}
    assert kept == {name_of(c.trial) for c in chains}  # the heads of the others are not


def test_the_winner_is_a_chain_where_one_is_best_and_the_result_names_it(study: Result, content: Any) -> None:
    chosen, record = study.chosen, json.loads((study.out / "result.json").read_text())
    assert chosen.metrics["AP"] == max(c.metrics["AP"] for c in study.candidates if c.seeds == 2)
    told = next(c for c in record["candidates"] if c["is_chosen"])
    assert told["name"] == name_of(chosen.trial) and told["chain"] == list(chosen.chain)
    assert content(study.head) == content(study.out / "heads" / name_of(chosen.trial) / "1")
    single = max(c.metrics["AP"] for c in study.candidates if not c.chain)
    assert max(c.metrics["AP"] for c in study.candidates if c.chain) >= single


def test_a_study_killed_among_its_chains_goes_on_and_does_nothing_twice(
    study: Result, caches: tuple[Path, Path], tmp_path: Path, content: Any
) -> None:
    out, journal = tmp_path / "killed", tmp_path / "killed" / "optuna.journal"
    options = [f"--{k if k != 'trials' else 'budget'}={v}" for k, v in OPTIONS.items()]
    command = ["tune", "--cache", str(caches[0]), "--tune-cache", str(caches[1]), "--out", str(out), *options]
    command += ["--no-average", "--processes=1", "--device=cpu", "--methods", ",".join(METHODS_HERE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for many in (1, 10):
        process = subprocess.Popen([sys.executable, "-m", "calib.cli", *command], env=environment)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and len(re.findall(r'"-\d{4,}/0/0":', journal.read_text())) >= many:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = Counter(re.findall(r'"(-?\d+/\d+/\d+)":', journal.read_text()))
    assert before and set(before.values()) == {1}
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    after = Counter(re.findall(r'"(-?\d+/\d+/\d+)":', journal.read_text()))
    twice = {key for key, times in after.items() if times > 1}
    finalists = {f"{c.trial}/0/0" for c in study.candidates if c.chain and c.seeds == 2}
    assert twice <= finalists  # their heads are written once they are wanted
    columns = "SELECT * EXCLUDE seconds FROM '{}/trials.parquet'"
    assert duckdb.sql(columns.format(out)).fetchall() == duckdb.sql(columns.format(study.out)).fetchall()
    assert content(out / "heads") == content(study.out / "heads")
    assert json.loads(done.stdout)["candidates"][0]["chain"] == list(study.chosen.chain)


@pytest.mark.slow
def test_two_processes_find_the_same(study: Result, caches: tuple[Path, Path], tmp_path: Path, content: Any) -> None:
    again = tune(*caches, tmp_path / "s", Plan(**OPTIONS, methods=METHODS_HERE, average=False), processes=2)
    assert content(again.out / "heads") == content(study.out / "heads")
    columns = "SELECT * EXCLUDE seconds FROM '{}/trials.parquet'"
    assert duckdb.sql(columns.format(again.out)).fetchall() == duckdb.sql(columns.format(study.out)).fetchall()


def test_a_search_on_a_given_base(caches: tuple[Path, Path], base: Path, tmp_path: Path, content: Any) -> None:
    command = ["tune", "--cache", str(caches[0]), "--tune-cache", str(caches[1]), "--budget=10", "--steps=8"]
    command += ["--seeds=1", "--bases=0", "--no-average", "--processes=1", "--device=cpu", "--json", f"--base={base}"]
    named = [*command, "--out", str(tmp_path / "s"), "--methods=norcal,discriminant,natural"]
    done = CliRunner().invoke(app, named)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    chosen = next(c for c in told["candidates"] if c["is_chosen"])
    assert [link["method"] for link in chosen["chain"]] == ["natural"] and told["base"]["AP"] > 0
    settings = chosen["settings"]
    train(chosen["method"], caches[0], tmp_path / "again" / "1", settings, base=base)
    assert content(tmp_path / "again" / "1") == content(Path(told["head"]))
    other = tmp_path / "other"
    train("natural", caches[0], other, {"steps": 20, "warmup_steps": 0})
    for arguments, code in (([f"--base={other}"], 2), (["--methods=norcal,crt"], 2), (["--base=nothing/1"], 2)):
        assert CliRunner().invoke(app, [*named, *arguments]).exit_code == code
    fitted = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "t"), "--base=natural:steps=5", "--budget=24"])
    assert fitted.exit_code == 0, fitted.output
    assert not list(tmp_path.glob(".t.base"))
    rows = duckdb.sql(f"SELECT DISTINCT method, error FROM '{tmp_path}/t/trials.parquet'").fetchall()
    tried = {m for m, _ in rows}
    assert {m for m, i in METHODS.items() if i.base != "ignores" and i.name != "softmax"} <= tried
    assert not [r for r in rows if r[1]] and "crt" not in tried


def test_every_method_takes_the_settings_it_is_searched_with_on_a_base(
    caches: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    """All choices: what a setting refuses on a base is no part of the space there."""
    for name, space in read_spaces(on_base=True).items():
        if METHODS[name].base == "ignores":
            continue
        others = [{d.key: v} for d in space.dimensions if d.kind == "choice" for v in d.values[1:]]
        for changed in ({}, *others):
            settings = space.centre | changed
            settings = with_steps(name, settings, 2) if space.learns else settings
            settings |= {"hidden": 5} if "hidden" in settings else {}
            train(name, caches[0], tmp_path / "head", settings, base=base, overwrite=True)


@pytest.mark.parametrize("below", ["natural", "residual", "disalign", "logit-adjustment", "norcal"])
def test_logits_that_are_kept_give_the_same_bits(below: str, caches: tuple[Path, Path], tmp_path: Path) -> None:
    cache, assessment = Cache(caches[0]), Assessment(Cache(caches[1]))
    quick = {"steps": 6, "warmup_steps": 0, "lr": 0.1}
    quick = {k: v for k, v in quick.items() if has_key(settings_of(below, {}, 0), k)}
    base = train(below, cache, tmp_path / "base", quick).head
    nms = detector_nms(assessment.cache)
    judges = [OnBase(assessment, base), OnBase(assessment, base, limit=0)]
    for name in (m for m, i in METHODS.items() if i.base != "ignores" and m != "softmax"):
        try:
            own = {"steps": 3} if has_key(settings_of(name, {}, 0), "steps") else {}
            head = train(name, cache, tmp_path / name, own, base=load(tmp_path / "base")).head
        except UnsupportedError:
            continue  # it needs a linear layer
        plain = assessment.found(head, nms)
        for judge in (*judges, judges[0]):
            found = judge.found(head, nms)
            assert isinstance(found, Rescored) and isinstance(plain, Rescored)
            for what in ("box", "category", "score"):
                assert (getattr(found, what) == getattr(plain, what)).all()


def test_the_logits_of_a_base_are_computed_once(caches: tuple[Path, Path], tmp_path: Path) -> None:
    cache, assessment = Cache(caches[0]), Assessment(Cache(caches[1]))
    train("residual", cache, tmp_path / "base", {"steps": 6, "warmup_steps": 0, "hidden": 5})
    base, calls = load(tmp_path / "base"), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    base.head.register_forward_hook(count)  # copies of a module keep it
    judge, images = OnBase(assessment, base.head), len(assessment.cache.images)
    for k, name in enumerate(("norcal", "fracal", "logit-adjustment", "discriminant")):
        head = train(name, cache, tmp_path / str(k), base=base).head
        judge.found(head, detector_nms(assessment.cache))
    assert images <= calls[0] <= images + 4  # and once per head for their number


def test_a_cascade_is_searched_too(tmp_path: Path) -> None:
    ours, theirs = (Toy(stages=2, mode=m).write(tmp_path / m).path for m in ("train", "test"))
    plan = Plan(trials=6, steps=8, seeds=1, finalists=1, stacked=4, average=False, methods=("natural", "norcal"))
    found = tune(ours, theirs, tmp_path / "study", plan)
    rows = duckdb.sql(f"SELECT AP FROM '{found.out}/trials.parquet' WHERE base IS NOT NULL").fetchall()
    assert len(rows) == 4 and all(ap is not None for (ap,) in rows)


def test_a_method_without_a_space_is_tried_once_with_its_defaults(
    caches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = MethodInfo("plain", f"{__name__}:Plain", "", ("features",), "nothing", "", base="transforms")
    monkeypatch.setitem(registry.METHODS, "plain", plain)
    assert read_spaces()["plain"] == Space("plain", {}, ())
    found = tune(*caches, tmp_path / "s", Plan(trials=8, steps=8, seeds=1, methods=("plain", "tau-norm"), bases=1))
    tried = duckdb.sql(f"SELECT method, settings FROM '{found.out}/trials.parquet' WHERE trial >= 0").fetchall()
    assert [t for t in tried if t[0] == "plain"] == [("plain", "{}")] and len(tried) == 8


class Plain:
    """A method of somebody else's."""

    def __new__(cls) -> Any:
        from calib.methods.logit_adjustment import LogitAdjustment

        return LogitAdjustment()


def test_names_of_trials() -> None:
    assert [name_of(n) for n in (0, 36, -1, -2, -4)] == ["0", "36", "detector", "average-1", "average-3"]
    for b, k in ((0, 0), (36, 12), (5, 999)):
        assert name_of(number_on(b, k)) == f"{b}.{k}"


def test_an_average_is_called_by_its_methods() -> None:
    links = [
        {"trial": t, "method": m, "settings": {}}
        for t, m in (("10.6", "discriminant"), ("10", "crt"), ("17", "fracal"))
    ]
    made = {"settings": {"one": "10.6", "other": "17"}, "steps": 0, "seeds": 1, "metrics": {}, "spread": {}}
    assert Candidate(0, AVERAGE, chain=tuple(links), **made).label == "average of discriminant on crt and fracal"
    assert Candidate(0, "discriminant", chain=tuple(links[1:2]), **made).label == "discriminant on crt"
