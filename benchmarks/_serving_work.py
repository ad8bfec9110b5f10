"""The head, the proposals of one image, the requests that ask for them, and what the right answers are.

Letters: N proposals, D feature size, C foreground classes.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
from _serving_process import Reply, post
from numpy.typing import NDArray

from calib.artifact import Artifact, HeadInfo, save
from calib.heads.linear import LinearClassifier, LinearHead
from calib.score.detect import detect
from calib.settings import Nms

ROWS, FEATURE_SIZE, CLASSES, OBJECTS = 1000, 1024, 1203, 30
MODEL = "head"
BINARY = "application/octet-stream"
ARROW = "application/vnd.apache.arrow.stream"
TOP = ("TOP_SCORES", "TOP_ROWS", "TOP_CLASSES", "TOP_OFFSETS")
DETECTIONS = ("DET_BOXES", "DET_SCORES", "DET_CLASSES", "DET_ROWS", "DET_OFFSETS")
TOPK = 300
NMS = Nms(score_threshold=1e-4, nms_iou=0.5, max_detections=300)
_DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32}

Check = Callable[[Reply], None]


class WrongAnswerError(Exception):
    """An answer that is not the head's."""


def expect(condition: bool, what: str) -> None:
    """Raise WrongAnswerError unless ``condition``."""
    if not condition:
        raise WrongAnswerError(what)


def expect_ok(reply: Reply) -> None:
    """Raise WrongAnswerError unless the status is 200."""
    expect(reply.status == 200, f"status {reply.status}: {bytes(reply.body[:300])!r}")


@dataclass(frozen=True)
class Work:
    """A linear head of LVIS size and the proposals of one image."""

    weight: NDArray[np.float32]  # [C + 1, D]
    bias: NDArray[np.float32]  # [C + 1]
    features: NDArray[np.float16]  # [N, D]
    boxes: NDArray[np.float32]  # [N, 4]

    @classmethod
    def made_up(cls) -> "Work":
        """Objects with jittered copies as a detector proposes them.

        Proposals of an object share their box and their class but for noise, and the classifier knows these classes
        well, others not at all: half of the best scores lie above 0.5, one in six of all scores above 1e-4.
        """
        rng = np.random.default_rng(0)
        centre = rng.normal(size=(OBJECTS, FEATURE_SIZE))
        of = rng.integers(0, OBJECTS, ROWS)
        features = np.maximum(centre[of] + 0.7 * rng.normal(size=(ROWS, FEATURE_SIZE)), 0)
        weight = 0.05 * rng.normal(size=(CLASSES + 1, FEATURE_SIZE))
        known = rng.choice(CLASSES, OBJECTS, replace=False)
        weight[known] += 0.6 / np.sqrt(FEATURE_SIZE) * np.maximum(centre, 0)
        bias = np.zeros(CLASSES + 1, np.float32)
        bias[-1] = 9
        sides = rng.uniform(40, 400, (OBJECTS, 2))
        corner = rng.uniform(0, 1, (OBJECTS, 2)) * ([1333, 800] - sides)
        boxes = np.hstack([corner, corner + sides])[of] + 0.08 * np.tile(sides, 2)[of] * rng.normal(size=(ROWS, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        boxes = boxes.clip(0, [1333, 800, 1333, 800])
        return cls(weight.astype(np.float32), bias, features.astype(np.float16), boxes.astype(np.float32))

    @cached_property
    def head(self) -> LinearHead:
        """The head as the library has it."""
        return LinearHead(LinearClassifier(torch.from_numpy(self.weight), torch.from_numpy(self.bias)))

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """[N, C] by the library."""
        with torch.inference_mode():
            scores: NDArray[np.float32] = self.head.scores(torch.from_numpy(self.features).float()).numpy()
        return scores

    def save(self, folder: Path) -> None:
        """The head as an artifact under ``models/`` and, for the peers, as ``head.npz``."""
        info = HeadInfo(
            method="softmax",
            settings={},
            seed=0,
            cache_digest="0",
            detector_digest="0",
            category_ids=[*range(1, CLASSES + 1)],
            category_names=[f"category {i}" for i in range(1, CLASSES + 1)],
            instance_counts=[1] * CLASSES,
            detector={name: getattr(NMS, name) for name in NMS.__dataclass_fields__},
        )
        save(folder / "models" / MODEL / "1", Artifact(self.head, info))
        np.savez(folder / "head.npz", weight=self.weight, bias=self.bias, features=self.features)

    # Requests

    def infer(self, outputs: tuple[str, ...], parameters: dict[str, Any], *, boxes: bool = False) -> bytes:
        """An inference request with binary tensors."""
        tensors = [("FEATURES", "FP16", self.features)] + [("BOXES", "FP32", self.boxes)] * boxes
        inputs = [
            {"name": n, "datatype": d, "shape": a.shape, "parameters": {"binary_data_size": a.nbytes}}
            for n, d, a in tensors
        ]
        asked = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        header = json.dumps({"inputs": inputs, "outputs": asked, "parameters": parameters}).encode()
        body = b"".join([header, *(array.tobytes() for _, _, array in tensors)])
        return post(f"/v2/models/{MODEL}/infer", body, BINARY, {"Inference-Header-Content-Length": str(len(header))})

    def infer_json(self, headers: dict[str, str] | None = None) -> bytes:
        """An inference request in JSON; calib and MLServer read the same."""
        data = self.features.astype(np.float32).reshape(-1)
        tensor = {"name": "FEATURES", "datatype": "FP32", "shape": self.features.shape, "data": data}
        body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
        return post(f"/v2/models/{MODEL}/infer", body, "application/json", headers)

    def raw(self, path: str) -> bytes:
        """A request whose body is the features."""
        return post(path, self.features.tobytes(), BINARY)

    def arrow(self) -> bytes:
        """A rescore request as an Arrow stream."""
        columns = {"features": self.features, "boxes": self.boxes}
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(a.reshape(-1)), a.shape[1]) for a in columns.values()]
        settings = {name: str(getattr(NMS, name)) for name in NMS.__dataclass_fields__}
        batch = pa.record_batch(arrays, names=[*columns]).replace_schema_metadata({"model": MODEL, **settings})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return post("/v1/rescore", sink.getvalue().to_pybytes(), ARROW)

    # Right answers

    def dense(self, reply: Reply) -> None:
        """Bit by bit the library's scores."""
        expect(np.array_equal(_tensors(reply)["SCORES"], self.scores), "the scores are not those of the library")

    def half(self, reply: Reply) -> None:
        """The library's scores, rounded."""
        rounded = self.scores.astype(np.float16)
        expect(np.array_equal(_tensors(reply)["SCORES"], rounded), "the scores are not those of the library in float16")

    def bf16(self, reply: Reply) -> None:
        """Near the library's scores, but not the same."""
        expect_ok(reply)
        found = _tensors(reply)["SCORES"]
        expect(not np.array_equal(found, self.scores), "the scores are those of float32")
        worst = float(np.abs(found - self.scores).max())
        expect(found.shape == self.scores.shape and worst < 0.05, f"scores are off by up to {worst:.4f}")

    def top(self, reply: Reply) -> None:
        """The best scores of the image in order."""
        found = _tensors(reply)
        best = np.argsort(-self.scores.reshape(-1), kind="stable")[:TOPK]
        same = np.array_equal(found["TOP_SCORES"], self.scores.reshape(-1)[best])
        rows, classes = np.divmod(best, CLASSES)
        same &= np.array_equal(found["TOP_ROWS"], rows) and np.array_equal(found["TOP_CLASSES"], classes)
        expect(same, "the best scores are not those of the library")

    def detections(self, reply: Reply) -> None:
        """The library's detections."""
        found, expected = _tensors(reply), self._detected
        pairs = [("ROWS", expected.row), ("CLASSES", expected.category)]
        pairs += [("SCORES", expected.score), ("BOXES", expected.box)]
        same = all(np.array_equal(found[f"DET_{name}"], array) for name, array in pairs)
        expect(same, "the detections are not those of the library")

    def arrow_detections(self, reply: Reply) -> None:
        """The library's detections in Arrow."""
        expect_ok(reply)
        found, expected = pa.ipc.open_stream(bytes(reply.body)).read_all(), self._detected
        same = all(np.array_equal(found[name], getattr(expected, name)) for name in ("row", "score"))
        expect(same, "the detections are not those of the library")

    def scores_in_json(self, reply: Reply, *, exactly: bool = False) -> None:
        """The library's scores, else to 1e-3; gzip or not."""
        expect_ok(reply)
        text = gzip.decompress(reply.body) if reply.headers.get("content-encoding") == "gzip" else bytes(reply.body)
        output = orjson.loads(text)["outputs"][0]
        scores = np.array(output["data"], np.float32).reshape(output["shape"])
        self._near(scores)
        expect(not exactly or np.array_equal(scores, self.scores), "the scores are not those of the library")

    def scores_in_bytes(self, reply: Reply) -> None:
        """The library's scores as float32, to 1e-3."""
        expect_ok(reply)
        self._near(np.frombuffer(reply.body, np.float32).reshape(ROWS, -1))

    def _near(self, scores: NDArray[np.float32]) -> None:
        expect(scores.shape == self.scores.shape, f"the scores have shape {scores.shape}")
        expect(bool(np.abs(scores - self.scores).max() < 1e-3), "the scores are not those of the head")

    @cached_property
    def _detected(self) -> Any:
        return detect(np.ascontiguousarray(self.scores), self.boxes, NMS)


def _tensors(reply: Reply) -> dict[str, NDArray[Any]]:
    """Outputs of an inference reply."""
    expect_ok(reply)
    at = int(reply.headers["inference-header-content-length"])
    found = {}
    for output in orjson.loads(reply.body[:at])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        array = np.frombuffer(reply.body[at : at + size], _DTYPES[output["datatype"]])
        found[output["name"]] = array.reshape(output["shape"])
        at += size
    return found
