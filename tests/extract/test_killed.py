"""Extraction killed anywhere, and resumed: the same files as one that was never interrupted."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.cache.damage import find_damage
from calib.cache.schema import Manifest
from calib.extract.dataset import Dataset
from calib.layout import MANIFEST

pytest.importorskip("torchvision")

# Forks for every moment a child that extracts, and is killed by the kernel when any of its threads makes the n-th call
# of those that open, rename, make or remove something in the cache. Then another one that resumes. Without a number
# it prints how many there are.
SCRIPT = """
import importlib.util, json, os, signal, sys
from pathlib import Path
import torch
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import TorchvisionAdapter

spec = importlib.util.spec_from_file_location("made_up", sys.argv[1])
made_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up)
work, moments = Path(sys.argv[2]), json.loads(sys.argv[3])
settings = Extraction("train", images_per_shard=2, batch_size=1)
torch.set_num_threads(1)
adapter = TorchvisionAdapter(made_up.tiny_detector(), "tiny", torch.device("cpu"))  # once: importing takes seconds
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}

def run(out, n, resume):
    calls = 0
    def watch(event, arguments):
        nonlocal calls
        if event in WATCHED and str(out) in str(arguments[0]) + str(arguments[1:2]):
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    extract(adapter, Dataset.read(work / "a.json"), work / "images", out, settings, resume=resume)
    return calls

def child(*arguments):
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(write, str(run(*arguments)).encode())
        os._exit(0)
    os.close(write)
    status, said = os.waitpid(pid, 0)[1], os.read(read, 100)
    return os.waitstatus_to_exitcode(status), said.decode()

if not moments:
    print(child(work / "whole", 0, False)[1])
for n in moments:
    assert child(work / f"killed-{n}", n, False)[0] == -signal.SIGKILL, n
    os.system(f"cp -r {work}/killed-{n} {work}/left-{n}")
    assert child(work / f"killed-{n}", 0, True)[0] == 0, n
"""


def check(tmp_path: Path, content: Callable[[Path], dict[str, bytes]], moments: int, seed: int) -> None:
    def script(numbers: list[int]) -> str:
        arguments = [str(Path(__file__).with_name("conftest.py")), str(tmp_path), json.dumps(numbers)]
        done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    count = int(script([]))
    chosen = np.random.default_rng(seed).choice(np.arange(1, count + 1), min(moments, count), replace=False)
    script(chosen.tolist())
    expected, committed = content(tmp_path / "whole"), set()
    for n in chosen.tolist():
        left = tmp_path / f"left-{n}"
        if (left / MANIFEST).exists():
            assert not [d for d in find_damage(left).damages if d.shard], n  # what is committed is whole
            committed.add(len(Manifest.read(left).shards))
        assert content(tmp_path / f"killed-{n}") == expected, n
    assert len(committed) > 1  # some died early and some late


@pytest.fixture
def pictures(document: Callable[..., dict[str, Any]], read: Callable[[dict[str, Any]], Dataset]) -> None:
    boxes = [(i + 1, 10 * (i % 4 + 1), 5, 5, 20, 20) for i in range(8)]
    read(document([(40, 60)] * 8, boxes))


@pytest.mark.usefixtures("pictures")
def test_killed_anywhere_and_resumed_it_is_the_same(tmp_path: Path, content: Callable[..., Any]) -> None:
    check(tmp_path, content, moments=3, seed=0)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_killed_at_fifty_moments(tmp_path: Path, content: Callable[..., Any]) -> None:
    check(tmp_path, content, moments=50, seed=1)
