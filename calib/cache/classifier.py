"""The frozen detector's own last layer, background last, as stored beside the features it was fed with."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from calib.errors import FormatError, InputError, ShapeError
from calib.files import replacing, require

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Classifier:
    """Letters: C foreground classes, D feature size, K = 1 (class-agnostic boxes) or C. C + 1 rows with the background
    last, C of a sigmoid detector, C + 2 of a seesaw detector (object and background last).

    ``scale`` is present for a cosine head: logits = scale * normalize(x) . normalize(weight) (+ bias). fc1 and
    fc2 are the two layers before it: features = relu(fc2(relu(fc1(map)))).
    """

    weight: Array  # [C+1, D]
    bias: Array | None = None  # [C+1]
    scale: Array | None = None  # [1]
    box_weight: Array | None = None  # [K*4, D]
    box_bias: Array | None = None  # [K*4]
    fc1_weight: Array | None = None  # [H, channels * height * width], with RoI maps only
    fc1_bias: Array | None = None  # [H]
    fc2_weight: Array | None = None  # [D, H]
    fc2_bias: Array | None = None  # [D]
    identity: Array | None = None  # of layers that are not here, where features hold their logits: any numbers
    next: tuple["Classifier", ...] = ()  # of a cascade: those of its later stages, of the same shapes

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            shape = None if self.bias is None else self.bias.shape
            raise ShapeError(
                f"classifier weight has shape {self.weight.shape} and bias {shape}: expected [C+1, D], [C+1]"
            )
        if self.scale is not None and (self.scale.shape != (1,) or not self.scale[0] > 0):
            raise InputError(f"classifier scale is {self.scale.tolist()}: expected one number above 0")
        if any(c.weight.shape != self.weight.shape for c in self.next):
            shapes = [list(c.weight.shape) for c in self.stages]
            raise ShapeError(f"classifiers of a cascade have shapes {shapes}: expected one for all stages")

    @property
    def stages(self) -> tuple["Classifier", ...]:
        """One classifier per stage of a cascade, first to last; itself where there is one."""
        return (replace(self, next=()), *self.next) if self.next else (self,)

    def digest(self) -> str:
        """Identifies the detector: xxh3-64 over all tensors but fc1 and fc2, which not every cache of it has."""
        h = xxhash.xxh3_64()
        for name, tensor in self._tensors().items():
            if name.startswith("fc"):
                continue
            h.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
        return h.hexdigest()

    def logits(self, features: Array) -> Array:
        """[N, D] -> [N, C+1], as the detector computes them."""
        x, w = features, self.weight
        if self.scale is not None:
            x, w = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (x, w))
            x = self.scale * x
        z = x @ w.T
        return np.asarray(z if self.bias is None else z + self.bias, np.float32)

    def _tensors(self) -> dict[str, Array]:
        pairs = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "next"}
        own = {k: np.ascontiguousarray(v, np.float32) for k, v in pairs.items() if v is not None}
        later = (c._tensors().items() for c in self.next)
        return own | {f"stage{k}.{n}": t for k, tensors in enumerate(later, start=1) for n, t in tensors}

    def write(self, path: Path) -> None:
        """Write ``classifier.safetensors``."""
        with replacing(path) as temporary:
            temporary.write_bytes(save(self._tensors()))

    @classmethod
    def read(cls, path: Path) -> "Classifier":
        """Read ``classifier.safetensors``.

        Raises:
            MissingFileError: not there. FormatError: damaged. ShapeError: tensors that do not fit together. InputError:
                a scale that is not one number above 0.
        """
        try:
            return cls.of(_tensors_of(require(path, "classifier")))
        except (SafetensorError, TypeError, OSError) as e:
            raise FormatError(
                f"classifier {path} cannot be read: {e}", hint="write it again; of a cache: extract again"
            ) from e

    @classmethod
    def of(cls, tensors: dict[str, Array]) -> "Classifier":
        """From tensors by the names of the fields; those of a cascade's next stages begin with stage1., stage2. ...

        Raises:
            TypeError: a name that is none of these, or no weight. ShapeError, InputError: as ``read``.
        """
        parts: dict[str, dict[str, Any]] = {"": {}}
        for name, tensor in tensors.items():
            stage, _, own = name.rpartition(".")
            parts.setdefault(stage, {})[own] = tensor
        first = parts.pop("")
        later = [parts.pop(f"stage{k}", None) for k in range(1, len(parts) + 1)]
        if parts or "next" in first:
            raise TypeError(f"unexpected tensors of {', '.join(parts) or 'next'}: stages are stage1, stage2, ...")
        return cls(**first, next=tuple(cls(**own) for own in later if own))


def _tensors_of(path: Path) -> dict[str, Array]:
    """In float32, whatever precision they were saved in."""
    try:
        found = load_file(path)
    except TypeError:  # bfloat16 and float8, which numpy does not have
        from safetensors.torch import load_file as load_tensors

        found = {name: tensor.float().numpy() for name, tensor in load_tensors(path).items()}
    return {name: array.astype(np.float32) for name, array in found.items()}
