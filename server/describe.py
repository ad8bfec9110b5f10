"""What a client gets of a model: metadata, Triton's configuration, statistics."""

from collections.abc import Sequence
from typing import Any

from .formats.outputs import DETECTIONS, SCORES, TOP
from .formats.wire import FLOATS, Expected
from .inference import FEATURES, inputs_of
from .models import Model, description
from .service import Service

PLATFORM = "calib"


def metadata(service: Service, model: Model) -> dict[str, Any]:
    """Inputs, outputs, and under ``parameters`` what the protocol has no place for: categories and thresholds."""
    return {
        "name": model.name,
        "versions": [str(m.version) for m in service.repository.loaded(model.name)],
        "platform": PLATFORM,
        "inputs": [{"name": n, "datatype": e.datatypes[0], "shape": _dims(e)} for n, e in inputs_of(model).items()],
        "outputs": [{"name": n, "datatype": d, "shape": shape} for n, (d, shape) in _outputs(model).items()],
        "parameters": {
            "version": str(model.version),
            "datatypes": list(FLOATS),
            "precision": service.compute.precision,
            "device": str(service.compute.device),
            **description(model),
        },
    }


def _dims(expected: Expected) -> list[int]:
    """-1 where any length will do; a box input may be [N, 4 C] as well."""
    return [-1, *expected.widths[:1]]


def _outputs(model: Model) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape of every output; without names in a request SCORES is answered."""
    integers = ("TOP_ROWS", "TOP_CLASSES", "TOP_OFFSETS", "DET_CLASSES", "DET_ROWS", "DET_OFFSETS")
    outputs = {name: ("INT32" if name in integers else "FP32", [-1]) for name in (*TOP, *DETECTIONS)}
    outputs["DET_BOXES"] = ("FP32", [-1, 4])
    return {SCORES: ("FP32", [-1, model.head.num_classes])} | outputs


def config(model: Model) -> dict[str, Any]:
    """Triton's model configuration."""
    inputs: list[dict[str, Any]] = []
    for name, expected in inputs_of(model).items():
        one = {"name": name, "data_type": f"TYPE_{expected.datatypes[0]}", "dims": _dims(expected)}
        inputs.append(one if name == FEATURES else one | {"optional": True})
    outputs = [{"name": n, "data_type": f"TYPE_{d}", "dims": shape} for n, (d, shape) in _outputs(model).items()]
    config: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "calib",
        "max_batch_size": 0,
    }
    return config | {"input": inputs, "output": outputs}


def statistics(service: Service, models: Sequence[Model]) -> dict[str, Any]:
    """Counts and times over all workers."""
    pairs = zip(models, service.statistics(list(models)), strict=True)
    return {"model_stats": [{"name": m.name, "version": str(m.version), **s.as_json()} for m, s in pairs]}
