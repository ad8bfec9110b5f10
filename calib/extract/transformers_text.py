"""Adapter for detectors of transformers whose classes are prompts: a logit compares a query with a text.

OWL-ViT and OWLv2 divide a query and a prompt by their norms, add to the product a shift and multiply it with a scale,
both of the query: z = s (x . t + b). With features [s x, s b] and weights [t, 1] that is a linear classifier.

Grounding DINO and its kin mix prompts with the picture before they compare, token by token: no fixed weights give these
logits. They stand beside the query in the features, [x, z], and the classifier takes them from there. A class has the
largest logit of its prompt's tokens. Letters: N queries, D size of a query, C classes, L tokens, B images.
"""

from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from calib.cache import Classifier
from calib.errors import InputError
from calib.extract.adapter import ClassRule, Image, Own
from calib.extract.modules import recording
from calib.extract.staging import array
from calib.extract.transformers import QueryAdapter, Seen, model_type, refused

PROMPTS_HINT = '--detector-args \'{"prompts": ["cat", "dog"]}\', or the annotation file whose categories they are'
TOKENS, PROMPTS = "tokens", "prompts"  # what the library's logits are of
TEXT_FAMILIES = {
    "grounding-dino": TOKENS,
    "mm-grounding-dino": TOKENS,
    "owlv2": PROMPTS,
    "owlvit": PROMPTS,
}
_PADDED = ("owlv2",)  # pictures are padded to squares, of which boxes are shares
_SEPARATORS = ".?"


class TextAdapter(QueryAdapter):
    """A detector in eval mode with one prompt per class, all of them given in every forward pass.

    ``prompts``: by their names if all of them are categories, else in ascending category id.

    Raises:
        UnsupportedError: another kind of model. InputError: ``prompts`` that the model does not take.
    """

    def __init__(self, model: Any, processor: Any, source: str, device: torch.device, prompts: list[str]) -> None:
        kind = model_type(model)
        if kind not in TEXT_FAMILIES:
            raise refused(kind)
        if len({p.strip().lower() for p in prompts} - {""}) < max(1, len(prompts)):
            raise InputError("prompts must be different texts, one for each class", hint=PROMPTS_HINT)
        super().__init__(model, device)
        self.processor = processor.image_processor
        self._activation, self._columns = "sigmoid", list(range(len(prompts)))
        self._has_squares, self._by_token = kind in _PADDED, TEXT_FAMILIES[kind] == TOKENS
        # [L or C]: which class an output of the library stands for, -1 for none
        self._class_of = np.arange(len(prompts))
        self._text = self._tokens(processor, prompts) if self._by_token else self._sequences(processor, prompts)
        seen = self._run([np.zeros((64, 64, 3), np.uint8)])
        self._classifier = self._compared(seen.features.shape[2])
        self.classes = ClassRule("names", tuple(prompts), hint=PROMPTS_HINT)
        self._describe(source, kind, seen.logits.shape[1], None, prompts=prompts)

    def classifier(self) -> Classifier:
        """What makes logits of features (see ``Adapter.classifier``)."""
        return self._classifier

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """Those of the library's own post-processing: of every query the best output, where that stands for a class."""
        outputs = self.model(**self._inputs([image]))
        (found,) = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.shape[:2]])
        category = self._class_of[found["labels"].cpu().numpy()]
        row = np.flatnonzero(array(outputs.logits[0].amax(1).sigmoid()) > 0)
        chosen = category >= 0
        score, box = array(found["scores"])[chosen], array(found["boxes"])[chosen]
        return Own(category[chosen], score, box, row[chosen])

    def _box_size(self, height: int, width: int) -> tuple[int, int]:
        return (max(height, width),) * 2 if self._has_squares else (height, width)

    def _inputs(self, images: list[Image]) -> dict[str, Tensor]:
        text = {k: v.repeat(len(images), 1).to(self.device) for k, v in self._text.items()}
        return super()._inputs(images) | text

    @torch.no_grad()
    def _run(self, images: list[Image]) -> Seen:
        layer = self.model.class_embed[-1] if self._by_token else self.model.class_head
        given: list[Tensor] = []  # the arguments of the last call

        def note(module: Any, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            given[:] = [*args, *named.values()]

        with recording(layer.register_forward_pre_hook(note, with_kwargs=True)):
            found = self.model(**self._inputs(images))
        if not self._by_token:
            features, self._prompts = _scaled(layer, *given[:2])
            return Seen(features, found.logits, found.pred_boxes)
        own = [np.flatnonzero(self._class_of == k) for k in self._columns]
        logits = torch.stack([found.logits[:, :, k].amax(2) for k in own], dim=2)  # [B, N, C]
        return Seen(torch.cat([given[0], logits], dim=2), logits, found.pred_boxes)

    def _compared(self, size: int) -> Classifier:
        if not self._by_token:
            return Classifier(array(self._prompts))
        classes = len(self._columns)
        take = np.eye(classes, size, size - classes, dtype=np.float32)
        # These weights are equal in all detectors; a bias far below rounding tells them apart.
        return Classifier(take, (1e-30 * (1 + self._random().random(classes))).astype(np.float32))

    def _random(self) -> np.random.Generator:
        """Of the model's weights and the prompts."""
        h = xxhash.xxh3_64(b"".join(v.numpy().tobytes() for v in self._text.values()))
        for parameter in self.model.parameters():
            h.update(array(parameter).tobytes())
        return np.random.default_rng(h.intdigest())

    def _sequences(self, processor: Any, prompts: list[str]) -> dict[str, Tensor]:
        """One token sequence per prompt."""
        found = processor(text=[prompts], return_tensors="pt")
        most = self.model.config.text_config.max_position_embeddings
        if found["input_ids"].shape[1] > most:
            raise InputError(f"a prompt has more than the {most} tokens that the detector takes", hint="shorten it")
        return {k: found[k] for k in ("input_ids", "attention_mask")}

    def _tokens(self, processor: Any, prompts: list[str]) -> dict[str, Tensor]:
        """One token sequence of all prompts, as the library joins them; notes which token is of which class."""
        parts = [p.strip().lower() for p in prompts]
        strange = [p for p in parts if set(p) & set(_SEPARATORS)]
        if strange:
            raise InputError(f"prompt '{strange[0]}' has a mark that ends a prompt: one of {_SEPARATORS}")
        found = processor(text=[". ".join(parts) + "."], return_tensors="pt", return_offsets_mapping=True)
        length, most = found["input_ids"].shape[1], self.model.config.max_text_len
        if length > most:
            raise InputError(
                f"the prompts are {length} tokens; the detector takes {most} in one pass", hint="name fewer classes"
            )
        starts = np.cumsum([0, *(len(p) + 2 for p in parts)])
        first, last = found["offset_mapping"][0].numpy().T
        place = np.searchsorted(starts, first, side="right") - 1
        ends = starts[:-1] + [len(p) for p in parts]
        inside = (last > first) & (last <= ends[place.clip(0, len(parts) - 1)])
        self._class_of = np.full(most, -1)
        self._class_of[:length] = np.where(inside, place, -1)
        return {k: found[k] for k in ("input_ids", "attention_mask", "token_type_ids")}


def _scaled(head: Any, queries: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, D], [B, C, D] -> features [B, N, D + 1], weights [C, D + 1] of the class head of OWL-ViT."""
    x, t = (v / (torch.linalg.norm(v, dim=-1, keepdim=True) + 1e-6) for v in (head.dense0(queries), prompts[0]))
    scale = head.elu(head.logit_scale(queries)) + 1
    shift = head.logit_shift(queries)
    return torch.cat([x * scale, shift * scale], dim=2), torch.cat([t, torch.ones_like(t[:, :1])], dim=1)
