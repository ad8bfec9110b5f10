"""Several processes and one end in the same head; killed and run again they end in the same bytes."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.artifact import load
from calib.cache import Cache
from calib.errors import (
    ExistsError,
    FitError,
    NonFiniteError,
    ProcessError,
    SettingError,
    UnknownNameError,
    UnsupportedError,
)
from calib.methods.ecm import ECM
from calib.methods.text import Text
from calib.parallel.devices import device_of_rank
from calib.parallel.distributed import World, launch
from calib.registry import METHODS
from calib.training import train

from ..ranks import plan, train_all, train_in_threads, train_spoiled
from ..test_methods import quick
from ..toy import Toy

Content = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).parents[2]
FIVE = ("natural", "bags", "disalign", "simcal", "seesaw")
LONG: dict[str, Any] = {"steps": 200, "warmup_steps": 20, "lr": 0.05, "checkpoint_every": 50}
# Settings that change how a loss is summed or what is remembered, besides the defaults of every method.
OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bags", {"others": "all"}),
    ("bags", {"others": "none", "clip_norm": 0.5}),
    ("disalign", {"base": "cosine", "base_loop.steps": 4}),
    ("simcal", {"form": "mlp"}),
    ("simcal", {"form": "3fc_rand"}),
    ("seesaw", {"counts": "dataset"}),
    ("pcb", {"base": "seesaw", "begin": 0}),
    ("pcb", {"base": "eql-v2", "begin": 0, "every_class_first": True}),
    ("pcb", {"form": "map", "begin": 0, "iterations": 3, "layer_norm": "both"}),
    ("natural", {"virtual": 0.5, "virtual_every": 2, "virtual_scale": 3.0}),
    ("bags", {"virtual": 0.5, "virtual_every": 2, "virtual_scale": 3.0}),
    ("bacl", {"begin": 0.0}),
    ("gol", {"tail_share": 0.5}),
    ("iif", {"when": "loss"}),
    ("logit-adjustment", {"when": "loss"}),
    ("balanced-softmax", {"form": "sigmoid"}),
    ("focal", {"form": "sigmoid"}),
    ("reweight", {"by": "power", "w_bg": 0.5}),
    ("tde", {"official_quirks": True}),
)

# At their own rates: ECM's gradients are forty times those of other heads (scale 20, logits doubled), and so is their
# rounding; AdamW makes steps of the rate's size out of rounding.
OWN: dict[str, dict[str, Any]] = {"ecm": {"lr": ECM().loop.lr}, "text": {"lr": Text().loop.lr}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy(feature_size=16, images=24, most=60, maps=True).write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes take over ``sys.path`` and import ``tests.ranks`` from there."""
    monkeypatch.syspath_prepend(str(ROOT))


def difference(a: Path, b: Path) -> float:
    """The largest of any number of two heads."""
    return max(float((x - y).abs().max()) for x, y in tensors(a, b))


def relative_difference(a: Path, b: Path) -> float:
    """The same, for each tensor divided by its largest number where that is above 1."""
    return max(float((x - y).abs().max()) / max(1.0, float(x.abs().max())) for x, y in tensors(a, b))


def tensors(a: Path, b: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ours, theirs = load(a).head.state_dict(), load(b).head.state_dict()
    return [(ours[k].double(), theirs[k].double()) for k in ours]


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("method", "own"), [*((m, OWN.get(m, {})) for m, info in METHODS.items() if info.trains), *OTHERS], ids=str
)
def test_every_method_divided_is_the_method_alone(
    method: str, own: dict[str, Any], ranks: int, cache: Cache, tmp_path: Path
) -> None:
    settings = quick(method) | own
    train(method, cache, tmp_path / "alone", settings)
    train_in_threads(ranks, plan(method, cache, tmp_path / "ranks", settings))
    assert relative_difference(tmp_path / "alone", tmp_path / "ranks") < 1e-6
    alone, together = load(tmp_path / "alone").info, load(tmp_path / "ranks").info
    assert (alone.processes, together.processes) == (1, ranks)
    assert [s for s, _ in alone.losses] == [s for s, _ in together.losses]
    assert torch.allclose(torch.tensor(alone.losses), torch.tensor(together.losses), rtol=1e-5, atol=1e-6)


def test_in_bfloat16_too(cache: Cache, tmp_path: Path) -> None:
    for method in ("natural", "crt", "bags"):
        settings = quick(method) | {"precision": "bf16"}
        train(method, cache, tmp_path / f"{method}-alone", settings)
        train_in_threads(2, plan(method, cache, tmp_path / f"{method}-ranks", settings))
        assert difference(tmp_path / f"{method}-alone", tmp_path / f"{method}-ranks") < 2e-2


def test_more_ranks_than_rows(cache: Cache, tmp_path: Path) -> None:
    settings = {"rows_per_step": 3, "steps": 5, "warmup_steps": 0}
    train("crt", cache, tmp_path / "alone", settings)
    train_in_threads(5, plan("crt", cache, tmp_path / "ranks", settings))
    assert difference(tmp_path / "alone", tmp_path / "ranks") < 1e-5


@pytest.mark.parametrize(("method", "key"), [("seesaw", "counts"), ("pcb", "counts"), ("tde", "direction")])
def test_state_kept_local_is_of_fewer_rows(method: str, key: str, cache: Cache, tmp_path: Path) -> None:
    base = quick(method) | ({"base": "seesaw"} if method == "pcb" else {})
    shared = {"counts": "online", "direction": "shared"}[key]
    for value in (shared, "local"):
        train(method, cache, tmp_path / f"alone-{value}", base | {key: value})
        train_in_threads(2, plan(method, cache, tmp_path / f"ranks-{value}", base | {key: value}))
    assert difference(tmp_path / f"alone-{shared}", tmp_path / "alone-local") == 0
    assert difference(tmp_path / f"ranks-{shared}", tmp_path / "ranks-local") > 1e-5


def test_ranks_divide_rows_among_themselves() -> None:
    rows = torch.arange(7)
    assert torch.cat([World(k, 3).shard(rows) for k in range(3)]).sort().values.tolist() == rows.tolist()
    assert World().shard(rows) is rows


@dataclass(frozen=True)
class Two:
    """Heads by two processes over gloo: the last of ``FIVE`` was cut short by ``error`` at step 130, and run again."""

    folder: Path
    error: ProcessError
    checkpoint: str  # what there was then

    @property
    def undisturbed(self) -> Path:
        """The head of the last of ``FIVE`` that nothing had happened to."""
        return self.folder / "undisturbed"


@pytest.fixture(scope="module")
def two(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Two:
    """In two launches, because starting torch takes the time."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        with pytest.raises(ProcessError) as e:
            launch(2, train_all, [(m, out / m, LONG) for m in FIVE], cache.path, (1, FIVE[-1], 130))
        (state,) = out.glob(f".{FIVE[-1]}.training/*/*/state.json")
        checkpoint = state.read_text()
        again = [(FIVE[-1], out / name, LONG) for name in (FIVE[-1], "undisturbed")]
        assert launch(2, train_all, again, cache.path) == [0, 1]
    return Two(out, e.value, checkpoint)


@pytest.mark.parametrize("method", FIVE)
def test_two_processes_end_in_the_head_of_one(method: str, two: Two, cache: Cache, tmp_path: Path) -> None:
    train(method, cache, tmp_path / "one", LONG)
    # In float32 two processes, and as many threads as torch takes here, sum in another order; the same for each number
    # of threads. Seesaw's weights end at 22, where neighbours are 1.9e-6 apart: they differ by 3 of these with one
    # thread, by 7 with two.
    assert relative_difference(tmp_path / "one", two.folder / method) < 1e-6
    assert load(two.folder / method).info.processes == 2


def test_a_rank_was_killed_and_the_training_run_again(two: Two, content: Content) -> None:
    assert re.fullmatch(r"rank 1 \(process \d+\) ended by SIGKILL", str(two.error))
    assert "goes on from the last checkpoint" in two.error.hint
    assert '"step": 100' in two.checkpoint
    assert content(two.folder / FIVE[-1]) == content(two.undisturbed)
    assert sorted(p.name for p in two.folder.iterdir()) == sorted([*FIVE, "undisturbed"])


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "method"), [(0, "bags"), (1, "simcal")])
def test_whichever_rank_is_killed(rank: int, method: str, cache: Cache, tmp_path: Path, content: Content) -> None:
    with pytest.raises(ProcessError, match=rf"rank {rank} \(process \d+\) ended by SIGKILL"):
        launch(2, train_all, [(method, tmp_path / "h", LONG)], cache.path, (rank, method, 77))
    assert train(method, cache.path, tmp_path / "h", LONG, processes=2).info.processes == 2
    train(method, cache.path, tmp_path / "undisturbed", LONG, processes=2)
    assert content(tmp_path / "h") == content(tmp_path / "undisturbed")


@pytest.mark.slow
def test_under_torchrun_the_command_trains_together(two: Two, cache: Cache, tmp_path: Path, content: Content) -> None:
    settings = [f"--set={key}={value}" for key, value in LONG.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "calib.cli", "train"]
    command += ["disalign", "--cache", str(cache.path), "--out", str(tmp_path / "h"), "--device", "cpu", *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes   2") == 1  # rank 0 alone speaks
    assert content(tmp_path / "h") == content(two.folder / "disalign")


@pytest.mark.slow
def test_what_ends_a_rank_is_raised_as_itself(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="natural: the loss is"):
        train("natural", cache.path, tmp_path / "h", LONG | {"lr": 1e38, "warmup_steps": 0}, processes=2)
    with pytest.raises(NonFiniteError, match=f"cache {cache.path} holds NaN"):
        launch(2, train_spoiled, "natural", cache.path, tmp_path / "h", LONG)
    with pytest.raises(SettingError, match="processes is 0"):
        train("natural", cache.path, tmp_path / "h", LONG, processes=0)
    assert not (tmp_path / "h").exists()


@pytest.mark.slow
def test_heads_dealt_to_processes_are_those_of_one(cache: Cache, tmp_path: Path, content: Content) -> None:
    methods = ("natural", "bags", "crt", "tau-norm", "focal")
    settings = {"steps": 20, "warmup_steps": 0, "rows_per_step": 40, "bags.beta": 4}
    train(methods, cache.path, tmp_path / "dealt", settings, processes=2)
    train(methods, cache, tmp_path / "one", settings)
    assert content(tmp_path / "dealt") == content(tmp_path / "one")
    with pytest.raises(FitError, match="bags"):
        train(methods, cache.path, tmp_path / "failed", settings | {"bags.lr": 1e38}, processes=2)
    assert {p.name for p in (tmp_path / "failed").iterdir()} >= set(methods) - {"bags"}


def test_what_learns_nothing_needs_no_ranks(cache: Cache, tmp_path: Path) -> None:
    assert train("tau-norm", cache.path, tmp_path / "h", {}, processes=2).info.processes == 1


def test_refused_before_a_process_is_started(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    train("tau-norm", cache, tmp_path / "there")
    with pytest.raises(ExistsError):
        train("bags", cache.path, tmp_path / "there", {}, processes=2)
    stages = Toy(stages=2).write(tmp_path / "cascade")
    with pytest.raises(UnsupportedError, match="of a cascade"):
        train("bags", stages.path, tmp_path / "h", {}, processes=2)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    arguments = ("--cache", cache.path, "--out", tmp_path / "h", "--processes", 2)
    assert "torchrun has started the processes already" in fails("train", "natural", *arguments)
    assert "torchrun has started" in fails("train", "natural", "crt", "--one-pass", *arguments)


def test_errors_can_be_sent() -> None:
    for error in (UnknownNameError("method", "bag", ["bags"], hint="look"), ProcessError("gone", hint="again")):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found), found.hint) == (type(error), str(error), error.hint)


@pytest.mark.gpu
def test_two_gpus_over_nccl_end_in_the_head_of_one(cache: Cache, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for every rank")
    for method in FIVE:
        train(method, cache, tmp_path / "one" / method, LONG)
        train(method, cache.path, tmp_path / "two" / method, LONG, device="cuda", processes=2)
        assert difference(tmp_path / "one" / method, tmp_path / "two" / method) < 1e-3


def test_the_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of_rank("cpu", 3) == torch.device("cpu")
    monkeypatch.setattr("calib.parallel.devices.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert device_of_rank("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(SettingError, match="one GPU: expected one per process"):
        device_of_rank("cuda:0", 0)
    with pytest.raises(SettingError, match="there are 2 GPUs"):
        device_of_rank("cuda", 2)
