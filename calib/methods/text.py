"""Text: a classifier whose weights are vectors of the category names, so that categories nobody trained on score too.

Papers: Zhou et al., Detecting Twenty-thousand Classes using Image-level Supervision (Detic), ECCV 2022; softmax:
Gu et al., Open-vocabulary Object Detection via Vision and Language Knowledge Distillation (ViLD), ICLR 2022.
Eq. (logits): z_c = t cos(W x + b, e_c) (+ beta); W, b (and beta) are learned, e_c is the vector of name c.
Eq. (loss): (1/N) sum_k sum_c BCE(z_kc, t_kc), scores sigmoid(z); ``form`` softmax: cross entropy with a learned vector
for the background. Categories without instances are left out of the loss.
Differs: the authors (facebookresearch/Detic 436cda2) train whole detectors, with a sample of the categories in every
step's loss. ``embeddings`` is a file with one vector per category, by ascending id, of any text encoder; without it
e_c counts the letter triples of the name, hashed into 512 numbers (Weinberger et al., Feature Hashing, ICML 2009),
which knows spelling and no meaning.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from calib.cache import Cache
from calib.errors import FormatError, NonFiniteError, SettingError, ShapeError
from calib.files import require
from calib.heads.base import Head
from calib.heads.text import FORMS, TextHead
from calib.losses.sigmoid import one_hot, weighted_bce
from calib.losses.softmax import cross_entropy
from calib.sampling.instance import InstanceSampler
from calib.settings import AdamLoop, ImageBatches, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings

HASHED = 512


def _images() -> ImageBatches:
    return ImageBatches(sampling="repeat-factor")


def _loop() -> AdamLoop:
    return AdamLoop(lr=2e-4, weight_decay=1e-4, schedule="cosine", clip_norm=1.0)


@dataclass(frozen=True)
class Text:
    """``embeddings``: a .npy file [C, E], none: hashed letters of the names; ``temperature``: t; ``bias``: where a
    learned beta starts, 0 for none."""

    embeddings: str | None = None
    form: str = "sigmoid"
    temperature: float = 50.0
    bias: float = 0.0
    images: ImageBatches = field(default_factory=_images)
    loop: AdamLoop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "form": {"choice": ["softmax", "sigmoid"]},
        "temperature": {"log": [10.0, 100.0]},
        "lr": {"log": [0.0002, 0.02]},
        "weight_decay": {"log": [1e-05, 0.1]},
    }

    def __post_init__(self) -> None:
        one_of(self, "form", FORMS)
        at_least(self, 0, "temperature")
        if self.temperature == 0:
            raise SettingError("temperature is 0: all scores would be the same", hint="--set temperature=50")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the projection."""
        names = self.names(cache)
        head = TextHead(names, cache.manifest.detector.feature_size, self.form, self.temperature, self.bias != 0)
        head.reset(self.bias, torch.Generator().manual_seed(context.seed))
        known = torch.from_numpy(cache.categories.instance_count > 0).to(context.device)
        loss = _sigmoid if self.form == "sigmoid" else _softmax

        def objective(batch: Batch) -> Tensor:
            return batch.chunk_mean(loss(head.raw(batch.features), batch.labels, known))

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="text")
        return head

    def names(self, cache: Cache) -> Tensor:
        """[C, E] vectors of the names of ``cache``.

        Raises:
            MissingFileError, FormatError, NonFiniteError: no such file, or no array of finite numbers in it.
            ShapeError: not one row for every category.
        """
        categories = cache.categories
        if self.embeddings is None:
            return hashed_names(categories.name)
        return read_embeddings(Path(self.embeddings), len(categories))


def _sigmoid(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    return weighted_bce(logits, one_hot(labels, len(known)), known.to(logits))


def _softmax(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    left_out = torch.cat([~known, known.new_zeros(1)])
    return cross_entropy(logits.masked_fill(left_out, -torch.inf), labels)


def read_embeddings(path: Path, categories: int) -> Tensor:
    """[C, E] of a .npy file; raises as ``Text.names``."""
    try:
        found = np.load(require(path, "file of embeddings"), allow_pickle=False)
    except (ValueError, EOFError, IsADirectoryError) as e:
        raise FormatError(f"file of embeddings {path} is no .npy array: {e}") from e
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise FormatError(f"file of embeddings {path} is no .npy array of numbers", hint="numpy.save(path, vectors)")
    if found.ndim != 2 or len(found) != categories or found.shape[1] == 0:
        raise ShapeError(
            f"embeddings of {path} have shape {list(found.shape)}: expected [{categories}, E]",
            hint="one vector per category, by ascending category id",
        )
    if not np.isfinite(found).all() or not found.any(axis=1).all():
        raise NonFiniteError(f"embeddings of {path} hold a row of zeros, NaN or infinity")
    return torch.from_numpy(found.astype(np.float32))


def hashed_names(names: tuple[str, ...]) -> Tensor:
    """C names -> [C, HASHED] signed counts of their letter triples."""
    out = np.zeros((len(names), HASHED), np.float32)
    for row, name in zip(out, names, strict=True):
        padded = f"  {name.lower().replace('_', ' ')}  "
        for k in range(len(padded) - 2):
            digest = xxhash.xxh3_64_intdigest(padded[k : k + 3].encode())
            row[digest % HASHED] += 1 if digest >> 63 else -1
    return torch.from_numpy(out)
