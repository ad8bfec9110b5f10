"""The commands on an S3 server: the same bytes as on the local disk, whatever is killed or cut on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.cache.remote_writer import RemoteWriter
from calib.cache.schema import Manifest
from calib.errors import ExistsError, InputError
from calib.extract.dataset import Dataset
from calib.extract.extraction import Division, extract
from calib.extract.options import Extraction
from calib.storage import Remote, local, parse

from ..extract import conftest as made_up
from ..toy import Toy
from .conftest import on_both
from .proxy import Proxy

pytest.importorskip("torchvision")

from calib.extract.torchvision import TorchvisionAdapter

Calib = Callable[..., Any]
Put = Callable[[Path, str], str]
Stored = Callable[[str], dict[str, bytes]]
SETTINGS = Extraction("train", images_per_shard=2, batch_size=1)


def open_tiny(number: int = 0) -> TorchvisionAdapter:
    torch.set_num_threads(1)
    return TorchvisionAdapter(made_up.tiny_detector(), "tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of noise with an object each: four shards."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in range(8):
        Image.fromarray(made_up.picture(40, 60, i)).save(folder / f"images/{i + 1}.png")
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": 40, "width": 60})
        box = {"bbox": [5, 5, 20, 20], "area": 400}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 10 * (i % 4 + 1), **box})
    categories = [{"id": 10 * (c + 1), "name": f"kind {c}"} for c in range(made_up.CLASSES)]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder


def run(pictures: Path, out: Path | Remote, settings: Extraction = SETTINGS, **more: Any) -> Manifest:
    return extract(open_tiny(), Dataset.read(pictures / "a.json"), pictures / "images", out, settings, **more)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the cache that a local run writes."""
    out = tmp_path_factory.mktemp("whole") / "c"
    run(pictures, out)
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def at(url: str) -> Remote:
    place = parse(url)
    assert isinstance(place, Remote)
    return place


@on_both
def test_extraction_writes_what_it_writes_locally_and_only_once(
    bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, tmp_path: Path
) -> None:
    run(pictures, at(f"{bucket}/c"))
    assert stored(bucket) == {f"c/{k}": v for k, v in whole.items()}
    with pytest.raises(ExistsError, match="holds a cache already"):
        run(pictures, at(f"{bucket}/c"))
    assert run(pictures, at(f"{bucket}/c"), resume=True).complete
    with pytest.raises(InputError, match="other settings"):
        run(pictures, at(f"{bucket}/c"), Extraction("train", images_per_shard=3, batch_size=1), resume=True)
    assert not list((tmp_path / "mirror").rglob("*.parquet"))  # nothing is left on this disk
    assert Cache(local(f"{bucket}/c")).n_rows == Manifest.read(local(f"{bucket}/c")).rows


@on_both
def test_a_second_extraction_is_refused_while_the_first_one_writes(
    bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, tmp_path: Path, monkeypatch: Any
) -> None:
    manifests = []

    def intrude(self: RemoteWriter, prepared: Any) -> None:
        monkeypatch.setattr(RemoteWriter, "admit", admit)
        monkeypatch.setenv("CALIB_MIRROR", str(tmp_path / "another machine"))
        for resume in (False, True):
            with pytest.raises(ExistsError, match=f"process {os.getpid()} on .* is writing {bucket}/c"):
                run(pictures, at(f"{bucket}/c"), resume=resume)
        monkeypatch.setenv("CALIB_MIRROR", str(tmp_path / "mirror"))
        manifests.append(prepared)
        admit(self, prepared)

    admit = RemoteWriter.admit
    monkeypatch.setattr(RemoteWriter, "admit", intrude)
    run(pictures, at(f"{bucket}/c"))
    assert manifests
    assert stored(bucket) == {f"c/{k}": v for k, v in whole.items()}


# Killed by itself, as hard as by the kernel, when it writes the n-th object in the store. Leases do not count: how
# often one is renewed depends on how busy the machine is.
KILLED = """
import os, signal, sys
from pathlib import Path
import importlib.util
sys.path.insert(0, sys.argv[1])
from tests.storage.test_commands import at, run
fs = at(sys.argv[3]).fs
n = int(sys.argv[4])
def counted(real):
    def call(*arguments, **named):
        global n
        n -= "lease-" not in str(arguments[0])
        if n == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call
for name in ("pipe_file", "put_file"):
    setattr(fs, name, counted(getattr(fs, name)))
run(Path(sys.argv[2]), at(sys.argv[3]))
"""


def killed(pictures: Path, url: str, n: int) -> None:
    root = Path(__file__).parents[2]
    code = [sys.executable, "-c", KILLED, str(root), str(pictures), url, str(n)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def check_killed(bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, n: int) -> None:
    url = f"{bucket}/killed-{n}/c"
    killed(pictures, url, n)
    if "c/manifest.json" not in stored(url.removesuffix("/c")):
        with pytest.raises(InputError, match=r"is not (complete|there)"):
            local(url)
    run(pictures, at(url), resume=True)
    assert stored(url.removesuffix("/c")) == {f"c/{k}": v for k, v in whole.items()}, n


@on_both
def test_killed_in_the_middle_it_goes_on_from_what_was_uploaded(
    bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, tmp_path: Path
) -> None:
    url = f"{bucket}/c"
    killed(pictures, url, 10)
    begun = stored(bucket)
    assert ".c.writing/00000.json" in begun and ".c.writing/00003.json" not in begun
    with pytest.raises(InputError, match="is not complete"):
        local(url)
    with pytest.raises(ExistsError, match="holds a cache already"):
        run(pictures, at(url))
    shutil.rmtree(tmp_path / "mirror")  # another machine goes on

    def modified(name: str) -> Any:
        return at(url).fs.modified(at(f"{bucket}/{name}").path)

    written = {k: modified(k) for k in begun if "shards/00000" in k}
    time.sleep(1)
    run(pictures, at(url), resume=True)
    assert stored(bucket) == {f"c/{k}": v for k, v in whole.items()}
    for name, when in written.items():  # what was committed was not written again
        assert modified(name) == when


@pytest.mark.slow
def test_killed_at_every_fourth_object(bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored) -> None:
    for n in range(1, 22, 4):
        check_killed(bucket, pictures, whole, stored, n)


@pytest.mark.slow
def test_several_processes_write_the_same(bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored) -> None:
    run(pictures, at(f"{bucket}/c"), division=Division(processes=2, open_detector=open_tiny))
    assert stored(bucket) == {f"c/{k}": v for k, v in whole.items()}


def check_cut(bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, proxy: Proxy, seed: int) -> None:
    random.seed(seed)  # of the back-off
    proxy.cut(seed, most=30_000)
    run(pictures, at(f"{bucket}/c"))
    cache = Cache(local(f"{bucket}/c"))
    features, cuts = cache.features.read(0, cache.n_rows), proxy.cuts
    proxy.calm()
    assert stored(bucket) == {f"c/{k}": v for k, v in whole.items()}
    assert features.shape == (cache.n_rows, cache.manifest.detector.feature_size) and np.isfinite(features).all()
    assert cuts > 5


def test_connections_that_are_cut_in_the_middle_are_survived(
    bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, proxy: Proxy
) -> None:
    check_cut(bucket, pictures, whole, stored, proxy, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_connections_that_are_cut_in_the_middle_are_survived_again(
    bucket: str, pictures: Path, whole: dict[str, bytes], stored: Stored, proxy: Proxy, seed: int
) -> None:
    check_cut(bucket, pictures, whole, stored, proxy, seed)


@pytest.fixture
def caches(tmp_path: Path, bucket: str, put: Put) -> Path:
    """Toy caches ``train`` and ``val``, here and below ``bucket``."""
    for name, toy in (("train", Toy()), ("val", Toy(mode="test"))):
        toy.write(tmp_path / "here/caches" / name)
        put(tmp_path / "here/caches" / name, f"{bucket}/caches/{name}")
    return tmp_path / "here"


@on_both
def test_training_and_scoring_from_and_to_the_server_equal_those_on_the_disk(
    bucket: str, caches: Path, calib: Calib, stored: Stored, content: Callable[[Path], dict[str, bytes]]
) -> None:
    for base in (str(caches), bucket):
        steps: list[list[Any]] = [
            ["train", "bags", "--out", f"{base}/models/bags/1", "--set", "steps=20"],
            ["train", "tau-norm", "softmax", "--one-pass", "--out", f"{base}/models"],
        ]
        for step in steps:
            done = calib(*step, "--cache", f"{base}/caches/train", "--json")
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout.splitlines()[0])["head"].startswith(f"{base}/models/")
        heads = [a for h in ("bags", "softmax") for a in ("--head", f"{base}/models/{h}/1")]
        steps = [
            [
                "score",
                "--cache",
                f"{base}/caches/val",
                *heads,
                "--out",
                f"{base}/out",
                "--results-json",
                f"{base}/json",
            ],
            ["evaluate", "--cache", f"{base}/caches/val", *heads, "--out", f"{base}/results"],
        ]
        for step in steps:
            done = calib(*step)
            assert done.exit_code == 0, done.output
    ours, theirs = content(caches), stored(bucket)
    same = [k for k in ours if not k.startswith(("caches/", "results/")) and "/." not in f"/{k}"]
    assert len(same) == 6 + 2 + 2 and {k: theirs.get(k) == ours[k] for k in same} == dict.fromkeys(same, True)
    summaries = [json.loads(c["results/bags/summary.json"]) for c in (ours, theirs)]
    assert summaries[0]["AP"] == summaries[1]["AP"] and summaries[1]["head"] == f"{bucket}/models/bags/1"
    asked = calib("analyze", f"{bucket}/results/bags", f"{bucket}/caches/val", f"{bucket}/out/bags.parquet", "--json",
                  "--sql", "SELECT run, (SELECT count(*) FROM meta) AS rows FROM summary")  # fmt: skip
    assert json.loads(asked.stdout) == [{"run": "bags", "rows": Cache(caches / "caches/val").n_rows}]
    served = calib("serve", "--models", f"{bucket}/models", "--check")
    assert served.exit_code == 0 and served.stdout.count("READY") == 3
    info = calib("cache", "info", f"{bucket}/caches/train", "--json")
    assert json.loads(info.stdout) == json.loads(calib("cache", "info", caches / "caches/train", "--json").stdout)
    checked = calib("cache", "check", f"{bucket}/caches/train")
    assert checked.exit_code == 0 and checked.stdout.endswith("sound\n")


def test_a_head_is_not_written_over(bucket: str, caches: Path, fails: Callable[..., str], calib: Calib) -> None:
    arguments = ["train", "softmax", "--cache", f"{bucket}/caches/train", "--out", f"{bucket}/models/a/1"]
    assert calib(*arguments).exit_code == 0
    assert f"{bucket}/models/a/1 exists" in fails(*arguments)
    assert calib(*arguments, "--overwrite", "--seed", 3).exit_code == 0
    assert f"{bucket}/caches/train" in fails(*arguments[:-1], f"{bucket}/caches/train")


def test_the_secret_stands_nowhere(
    bucket: str, caches: Path, calib: Calib, stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = calib("train", "softmax", "--cache", f"{bucket}/caches/train", "--out", f"{bucket}/models/a/1")
    wrong = calib("cache", "info", "s3://no-such-bucket/caches/train")
    kept = [p.read_bytes() for p in (tmp_path / "mirror").rglob("*") if p.is_file()]
    for text in (done.output.encode(), wrong.output.encode(), *kept, *stored(bucket).values()):
        assert b"the-secret" not in text and b"the-id" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "s3://b/h/1", "--to", "onnx", "--cache", "s3://b/c", "--out", "x"],
        ["report", "s3://b/results", "--out", "x.html"],
        ["cache", "merge", "s3://b/a", "s3://b/c", "--out", "x"],
        ["data", "shapes", "--out", "gs://b/set"],
    ],
)
def test_commands_without_object_storage_refuse_urls(
    fails: Callable[..., str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "takes a local path, not a URL" in fails(*arguments)
    assert not list(tmp_path.iterdir())
