"""A head of a cascade over HTTP: features of all stages side by side, boxes of the last."""

from pathlib import Path

import httpx
import numpy as np
import torch

from calib.score.detect import detect
from calib.settings import Nms
from calib.training import train
from tests.toy import Toy

from .conftest import running

STAGES, D, C = 3, 8, 7


def test_it_answers_what_the_library_does(tmp_path: Path) -> None:
    cache = Toy(stages=STAGES, average="logits").write(tmp_path / "c")
    head = train("natural", cache, tmp_path / "models" / "natural" / "1", {"steps": 2}).head
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, STAGES * D)).astype(np.float32)
    corner = rng.uniform(0, 50, (5, 2))
    boxes = np.concatenate([corner, corner + 20], axis=1).astype(np.float32)
    scores = head.scores(torch.from_numpy(features)).contiguous().numpy()
    wanted = detect(scores, boxes, Nms(1e-4, 0.5, 300))
    with running(tmp_path / "models", tmp_path / "log") as server, httpx.Client(base_url=server.url) as http:
        told = http.get("/v2/models/natural").json()
        assert told["parameters"]["stages"] == STAGES
        shapes = {i["name"]: i["shape"] for i in told["inputs"]}
        assert shapes["FEATURES"] == [-1, STAGES * D] and shapes["LOGITS"] == [-1, STAGES * (C + 1)]
        body = {"model": "natural", "features": features.tolist(), "boxes": boxes.tolist()}
        found = http.post("/v1/rescore", json=body).raise_for_status().json()["detections"]
        assert [(d["row"], d["category_index"]) for d in found] == list(
            zip(wanted.row.tolist(), wanted.category.tolist(), strict=True)
        )
        assert np.allclose([d["score"] for d in found], wanted.score, atol=1e-6)
        body["features"] = features[:, :D].tolist()
        refused = http.post("/v1/rescore", json=body)
        assert refused.status_code == 400 and "expected 24" in refused.text
