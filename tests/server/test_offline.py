"""What the service answers is what ``calib score`` writes, to the bit, for every kind of head."""

from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest

from calib.boxes import rescale
from calib.cache import Cache
from calib.cache.schema import REFINED_BOX
from calib.client import Client
from calib.registry import METHODS
from calib.registry import load as load_target
from calib.score import detector_nms, score
from calib.server.formats.arrow import MEDIA_TYPE
from calib.settings import known_keys
from calib.training import train

from ..score.test_score import KINDS
from ..toy import Toy
from .conftest import running
from .test_arrow import columns, stream

COUNTS = tuple(int(n) for n in np.geomspace(2000, 1, 90))


def quick(method: str) -> dict[str, object]:
    keys = known_keys(load_target(METHODS[method].target)())
    return {k: 2 for k in keys if k.rpartition(".")[2] == "steps"} | {k: 0 for k in keys if k.endswith("warmup_steps")}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Cache]:
    folder = tmp_path_factory.mktemp("toys")
    kinds = {mode: Toy(COUNTS, feature_size=128, images=4, mode=mode) for mode in ("train", "test")}
    return kinds["train"].write(folder / "train"), kinds["test"].write(folder / "test")


def test_served_detections_are_those_of_calib_score(caches: tuple[Cache, Cache], tmp_path: Path) -> None:
    train_cache, cache = caches
    heads = {
        kind: train(method, train_cache, tmp_path / "models" / kind / "1", quick(method) | settings).head
        for kind, (method, settings) in KINDS.items()
    }
    nms = detector_nms(cache)
    boxes = np.stack(cache.meta(*REFINED_BOX), axis=1)
    assert cache.logits is not None
    size = cache.images.to_pylist()[0]
    net, original = (size["net_height"], size["net_width"]), (size["height"], size["width"])
    with (
        running(tmp_path / "models", tmp_path / "log") as server,
        Client(server.url, trust_env=False) as client,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        for kind, head in heads.items():
            compared = 0
            for i, image in enumerate(score(cache, head, nms)):
                rows = slice(int(cache.image_start[i]), int(cache.image_start[i + 1]))
                features, logits = (m.read(rows.start, rows.stop) for m in (cache.features, cache.logits))
                found = client.detect(kind, features, boxes[rows], logits=logits)[0]
                wanted = image.detections
                assert found.row.tolist() == wanted.row.tolist() and found.category.tolist() == wanted.category.tolist()
                np.testing.assert_array_equal(found.score, wanted.score)
                np.testing.assert_array_equal(rescale(found.box, net, original), wanted.box)
                body = stream(columns(features, boxes[rows], logits=logits), model=kind)
                reply = http.post("/v1/rescore", content=body, headers={"Content-Type": MEDIA_TYPE})
                streamed = pa.ipc.open_stream(reply.content).read_all()
                np.testing.assert_array_equal(streamed["score"].to_numpy(), wanted.score)
                compared += len(wanted.row)
            assert compared > 10, kind
