"""``calib train``, ``score``, ``show`` and ``methods``: results on stdout alone, errors with exit code 2."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.artifact import load
from calib.cache import Cache
from calib.registry import METHODS

Calib = Callable[..., Any]
Fails = Callable[..., str]
Copied = Callable[[Path], Path]
QUICK = ("--set", "steps=20", "--set", "warmup_steps=0", "--device", "cpu")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- train


def test_train_reports_and_writes_a_head(calib: Calib, train_cache: Cache, tmp_path: Path) -> None:
    outcome = calib("train", "crt", "--cache", train_cache.path, "--out", tmp_path / "m" / "1", *QUICK, "--json")
    assert outcome.exit_code == 0, outcome.output
    metrics = json.loads(outcome.stdout)
    artifact = load(tmp_path / "m" / "1")
    assert metrics["method"] == "crt" and metrics["classes"] == 192 and metrics["seed"] == 0
    assert metrics["final_loss"] == artifact.info.losses[-1][1]
    assert metrics["settings"] == artifact.info.settings
    assert "train crt" in outcome.stderr and "20/20" in outcome.stderr


def test_set_goes_before_the_file(calib: Calib, train_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("rows_per_step = 64\n[loop]\nlr = 0.5\n")
    arguments = ("train", "crt", "--cache", train_cache.path, "--out", tmp_path / "h", *QUICK)
    outcome = calib(*arguments, "--config", tmp_path / "s.toml", "--set", "lr=0.25", "--json")
    settings = json.loads(outcome.stdout)["settings"]
    assert settings["rows_per_step"] == 64 and settings["loop"]["lr"] == 0.25 and settings["loop"]["steps"] == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bag",), "unknown method 'bag'. Did you mean 'bags'? hint: calib methods lists them"),
        (("bags", "--set", "betta=1"), "unknown setting 'betta'. Did you mean 'beta'?"),
        (("bags", "--set", "beta=x"), "setting 'beta' is 'x': expected float"),
        (("bags", "--set", "beta"), "'beta' is no setting: expected key=value"),
        (("bags", "--set", "steps=0"), "steps is 0: expected at least 1"),
        (("bags", "--config", "absent.toml"), "settings file not found: absent.toml"),
        (("bags", "--seed", "-1"), "seed is -1"),
        (("bags", "--device", "tpu"), "device 'tpu' cannot be used"),
        (("bags", "--cache", "absent"), "no feature cache at absent"),
    ],
)
def test_train_names_what_is_wrong(
    fails: Fails, train_cache: Cache, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    cache = () if "--cache" in arguments else ("--cache", train_cache.path)
    assert said in fails("train", *arguments, *cache, "--out", tmp_path / "models" / "h")
    assert names(tmp_path) == []


def test_train_needs_labels_and_a_free_place(
    fails: Fails, train_cache: Cache, val_cache: Cache, head: Path, tmp_path: Path
) -> None:
    message = fails("train", "bags", "--cache", val_cache.path, "--out", tmp_path / "h")
    assert f"cache {val_cache.path} was extracted with --mode test" in message
    message = fails("train", "bags", "--cache", train_cache.path, "--out", head)
    assert f"{head} exists" in message and "--overwrite" in message
    (tmp_path / "file").write_text("mine")
    message = fails("train", "softmax", "--cache", train_cache.path, "--out", tmp_path / "file" / "1")
    assert "hint: a file stands where a folder is needed" in message and names(tmp_path) == ["file"]


def test_a_diverging_training_is_an_error(fails: Fails, train_cache: Cache, tmp_path: Path) -> None:
    arguments = ("train", "crt", "--cache", train_cache.path, "--out", tmp_path / "h", *QUICK)
    assert "hint: lower the rate" in fails(*arguments, "--set", "lr=1e38")
    assert names(tmp_path) == []


def test_ctrl_c_while_training(train_cache: Cache, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(
        *("train", "crt", "--cache", train_cache.path, "--out", tmp_path / "h", "--device", "cpu"),
        *("--set", "steps=100000", "--set", "checkpoint_every=10"),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert stderr.rstrip().endswith("run the same command again to go on")
    assert names(tmp_path) == [".h.training"]


def test_several_methods_in_one_pass(calib: Calib, train_cache: Cache, tmp_path: Path) -> None:
    methods, own = ("natural", "bags", "tau-norm"), ("--set", "bags.beta=4", "--set", "tau-norm.tau=0.5")
    arguments = ("train", *methods, "--one-pass", "--cache", train_cache.path, "--out", tmp_path / "m", *QUICK, *own)
    outcome = calib(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.output
    metrics = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [f["method"] for f in metrics] == list(methods)
    assert metrics[1]["settings"]["beta"] == 4 and metrics[2]["settings"]["tau"] == 0.5
    assert [f["head"] for f in metrics] == [str(tmp_path / "m" / m / "1") for m in methods]
    assert "one pass for 2 heads: natural, bags" in outcome.stderr and "40/40" in outcome.stderr
    again = calib(*arguments, "--json")
    assert again.stdout == outcome.stdout and again.stderr.count("is there already") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("natural", "bags"), "2 methods: expected one hint: --one-pass trains several"),
        (("natural", "bags", "--one-pass", "--set", "crt.lr=1"), "setting 'crt.lr' is for crt, which is not trained"),
        (("natural", "bags", "--one-pass", "--set", "tau=1"), "no method of natural, bags has a setting 'tau'"),
        (("natural", "--one-pass", "--choose", "lr=1,2", "--tune", "x"), "--choose is for one method"),
    ],
)
def test_what_cannot_be_trained_together_is_said(
    fails: Fails, train_cache: Cache, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    message = fails("train", *arguments, "--cache", train_cache.path, "--out", tmp_path / "m")
    assert said in message and names(tmp_path) == []


def test_ctrl_c_while_several_train(
    train_cache: Cache, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(
        *("train", "natural", "crt", "--one-pass", "--cache", train_cache.path, "--out", tmp_path / "m"),
        *("--device", "cpu", "--set", "steps=100000", "--set", "checkpoint_every=10"),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert names(tmp_path / "m" / "natural") == [".1.training"]


# ---- damaged caches, by the commands that read them


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _edit(cache: Path, **changes: object) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | changes))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda c: (c / "manifest.json").unlink(), "no feature cache at"),
    (lambda c: _cut(c / "manifest.json"), "manifest.json is not valid JSON"),
    (lambda c: _cut(c / "shards/00000/features.parquet"), "00000/features.parquet has"),
    (lambda c: (c / "shards/00001/meta.parquet").unlink(), "has lost"),
    (lambda c: _cut(c / "classifier.safetensors"), "classifier.safetensors has"),
    (lambda c: _cut(c / "categories.parquet"), "categories.parquet has"),
    (lambda c: _cut(c / "images.parquet"), "images.parquet has"),
    (lambda c: _edit(c, version=7), "has format version 7; this calib reads versions 1 and 2"),
    (lambda c: _edit(c, complete=False), "is not complete: writing stopped after 2 shards"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_a_damaged_cache_is_refused_by_every_command(
    fails: Fails,
    val_cache: Cache,
    head: Path,
    copied: Copied,
    tmp_path: Path,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    cache = copied(val_cache.path)
    damage(cache)
    before = names(tmp_path)
    for arguments in (
        ("train", "softmax", "--cache", cache, "--out", tmp_path / "h"),
        ("score", "--cache", cache, "--head", head, "--out", tmp_path / "d.parquet"),
    ):
        message = fails(*arguments)
        assert said in message and str(cache) in message and "hint:" in message
    assert names(tmp_path) == before


# ---- score


def test_score_reports_and_writes(calib: Calib, val_cache: Cache, head: Path, tmp_path: Path) -> None:
    arguments = ("score", "--cache", val_cache.path, "--head", head, "--out", tmp_path / "d.parquet")
    outcome = calib(*arguments, "--results-json", tmp_path / "r.json", "--max-detections", "9", "--json")
    assert outcome.exit_code == 0, outcome.output
    metrics = json.loads(outcome.stdout)
    table = pq.read_table(tmp_path / "d.parquet")
    assert metrics == {"detections": str(tmp_path / "d.parquet"), "count": len(table), "images": 24}
    assert len(table) == 9 * 24 == len(json.loads((tmp_path / "r.json").read_text()))
    assert "score" in outcome.stderr and "24/24" in outcome.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--score-threshold", "-1", "score_threshold is -1.0: expected at least 0"),
        ("--score-threshold", "1.5", "lie in [0, 1]"),
        ("--nms-iou", "2", "lie in [0, 1]"),
        ("--max-detections", "0", "max_detections is 0: expected at least 1"),
        ("--head", "absent", "head not found: absent"),
        ("--cache", "absent", "no feature cache at absent"),
    ],
)
def test_score_names_what_is_wrong(
    fails: Fails, val_cache: Cache, head: Path, tmp_path: Path, option: str, value: str, said: str
) -> None:
    given: dict[str, object] = {"--cache": val_cache.path, "--head": head, "--out": tmp_path / "d.parquet"}
    given[option] = value
    assert said in fails("score", *(x for pair in given.items() for x in pair))
    assert names(tmp_path) == []


def test_score_refuses_the_head_of_another_detector_and_sampled_proposals(
    fails: Fails, val_cache: Cache, train_cache: Cache, head: Path, copied: Copied, tmp_path: Path
) -> None:
    other = copied(head)
    text = (other / "head.json").read_text()
    (other / "head.json").write_text(text.replace(val_cache.manifest.detector.digest, "0" * 16))
    out = ("--out", tmp_path / "d.parquet")
    message = fails("score", "--cache", val_cache.path, "--head", other, *out)
    assert f"head {other} was fitted for detector 0000" in message and "hint: train the head on a cache of" in message
    message = fails("score", "--cache", train_cache.path, "--head", head, *out)
    assert "was extracted with --mode train" in message and "hint: score a cache extracted with --mode test" in message
    assert not (tmp_path / "d.parquet").exists()


def test_score_refuses_outputs_that_cannot_be_written(
    fails: Fails, val_cache: Cache, head: Path, tmp_path: Path
) -> None:
    given = ("score", "--cache", val_cache.path, "--head", head, "--out")
    (tmp_path / "file").write_text("mine")
    assert "a file stands where a folder is needed" in fails(*given, tmp_path / "file" / "d.parquet")
    assert f"{tmp_path} is a folder" in fails(*given, tmp_path)
    assert "would both be written" in fails(*given, tmp_path / "d", "--results-json", tmp_path / "d")
    assert f"{tmp_path} is a folder" in fails(*given, tmp_path / "d", "--results-json", tmp_path)
    assert "/dev/null is a device" in fails(*given, "/dev/null")
    assert not list(Path("/dev").glob(".null*"))
    assert "would hold Parquet under the name of a JSON file" in fails(*given, tmp_path / "d.json")
    assert names(tmp_path) == ["file"]
    inside = "lies inside the head or cache"
    assert inside in fails(*given, val_cache.path / "manifest.json")
    assert inside in fails(*given, head / "d.parquet")
    assert inside in fails(*given, tmp_path / "d", "--results-json", val_cache.path / "shards" / "r.json")
    assert names(tmp_path) == ["file"]


def test_numbers_that_are_not_finite_are_refused(
    fails: Fails, train_cache: Cache, val_cache: Cache, head: Path, copied: Copied, tmp_path: Path
) -> None:
    """A cache by a tool that wrote NaN and hashed it faithfully."""
    import xxhash

    from calib.cache.matrix import write_matrix

    caches = [copied(train_cache.path), copied(val_cache.path)]
    for cache in caches:
        manifest = json.loads((cache / "manifest.json").read_text())
        shard = manifest["shards"][0]
        path = cache / "shards" / shard["name"] / "features.parquet"
        write_matrix(path, "features", np.full((shard["rows"], 256), np.nan, np.float16))
        content = path.read_bytes()
        shard["files"]["features.parquet"] = {"bytes": len(content), "xxh3": xxhash.xxh3_64(content).hexdigest()}
        (cache / "manifest.json").write_text(json.dumps(manifest))
    said = "holds NaN or infinite numbers in features.parquet hint: extract it again"
    assert said in fails("train", "crt", "--cache", caches[0], "--out", tmp_path / "h", *QUICK)
    assert said in fails("score", "--cache", caches[1], "--head", head, "--out", tmp_path / "d.parquet")
    assert not (tmp_path / "h").exists() and not list(tmp_path.glob("*d.parquet*"))


# ---- show


def test_show_a_head(calib: Calib, head: Path, val_cache: Cache) -> None:
    metrics = json.loads(calib("show", head, "--json").stdout)
    assert (metrics["method"], metrics["head"], metrics["seed"], metrics["classes"]) == ("softmax", "linear", 0, 192)
    assert metrics["parameters"] == 193 * 257 and metrics["cache"] == val_cache.digest
    plain = calib("show", head)
    assert plain.exit_code == 0 and plain.stderr == ""
    assert dict(line.split(maxsplit=1) for line in plain.stdout.splitlines())["feature_size"] == "256"


def test_show_a_cache(calib: Calib, train_cache: Cache) -> None:
    metrics = json.loads(calib("show", train_cache.path, "--json").stdout)
    assert metrics["mode"] == "train" and metrics["rows"] == train_cache.n_rows and metrics["images"] == 72
    assert metrics["shards"] == 5 and metrics["cache"] == train_cache.digest


def test_show_something_else(fails: Fails, tmp_path: Path) -> None:
    assert "is neither a head nor a cache" in fails("show", tmp_path)
    assert "head or cache not found" in fails("show", tmp_path / "absent")


# ---- methods


def test_methods_lists_every_method_whole(calib: Calib) -> None:
    """Not a terminal: nothing is cut off, whatever the width."""
    outcome = calib("methods")
    assert outcome.exit_code == 0
    text = " ".join(outcome.stdout.replace("│", " ").split())
    for m in METHODS.values():
        assert m.name in text
    assert "…" not in text
    assert [m["name"] for m in json.loads(calib("methods", "--json").stdout)] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_what_methods_prints_can_be_set(calib: Calib, name: str, tmp_path: Path) -> None:
    """Every ``key = value`` line, given back to ``--set``, is taken and changes nothing."""
    from calib.registry import load as load_target
    from calib.settings import parse_assignments, with_overrides

    lines = calib("methods", name).stdout.splitlines()
    assert METHODS[name].summary in lines[0] and METHODS[name].paper in lines[1]
    settings = load_target(METHODS[name].target)()
    given = [line.strip().replace(" = ", "=", 1) for line in lines if line.startswith("  ")]
    assert with_overrides(settings, dict(parse_assignments(given))) == settings
    keys = json.loads(calib("methods", name, "--json").stdout)["settings"]
    assert list(keys) == [g.partition("=")[0] for g in given]


def test_methods_suggests_the_nearest(fails: Fails) -> None:
    assert "unknown method 'disaling'. Did you mean 'disalign'?" in fails("methods", "disaling")
