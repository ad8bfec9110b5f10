"""Detectors whose classes are prompts: queries as RoIs, the detector's own numbers, and the model left as it was."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.errors import CalibError, FormatError, InputError, MissingFileError
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.transformers_open import open_detector
from calib.extract.transformers_text import TextAdapter
from calib.heads.detector import detector_head
from calib.score import detector_nms, score
from tests.extract.conftest import picture
from tests.extract.prompted import PROMPTED, QUERIES, TOKENS, build_prompted

pytest.importorskip("transformers")

CPU = torch.device("cpu")
SIZES = [(40, 60), (40, 60), (41, 57), (9, 12), (90, 31), (64, 64)]
PROMPTS = ["kind 0", "kind 1", "kind 2", "kind 3"]  # the categories of ``document``
Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]


def open_family(family: str, prompts: list[str] | None = None, seed: int = 0) -> TextAdapter:
    torch.set_num_threads(1)
    return TextAdapter(*build_prompted(family, seed), family, CPU, prompts or PROMPTS)


def own_output(family: str, model: Any, pixels: list[Any]) -> tuple[Any, Any]:
    """What the library makes of pictures and prompts, and its inputs; nothing of ours has a part in it."""
    _, processor = build_prompted(family)
    inputs = processor(
        images=pixels, text=[PROMPTS] * len(pixels), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        return model(**inputs), inputs["input_ids"]


def own_logits(family: str, output: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, N, C]: of tokens the largest between two separators."""
    if family.startswith("owl"):
        return torch.as_tensor(output.logits)
    ends = [k for k, token in enumerate(ids[0].tolist()) if token in (101, 1012)]
    parts = [output.logits[:, :, a + 1 : b].amax(2) for a, b in pairwise(ends)]
    return torch.stack(parts, dim=2)


@pytest.mark.parametrize("family", PROMPTED)
def test_replaying_the_cache_gives_the_detectors_own_detections(
    family: str, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    adapter, n = open_family(family), QUERIES[family]
    settings = Extraction(dtype="float32", images_per_shard=4)
    extract(adapter, read(document(SIZES)), tmp_path / "images", tmp_path / "c", settings)
    cache = Cache(tmp_path / "c")
    assert cache.manifest.proof["largest_difference"] < 1e-6 and cache.manifest.proof["detections"] > 0
    assert cache.n_rows == n * len(SIZES) and cache.logits is not None
    features, logits = cache.features.read(0, cache.n_rows), cache.logits.read(0, cache.n_rows)
    made = cache.classifier.logits(features)
    assert np.allclose(made, logits, atol=1e-5) and logits.std() > 0.1
    if "dino" in family:
        assert np.array_equal(made, logits)
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES)]
    for batch in ([0, 1], [2], [3], [4], [5]):
        output, ids = own_output(family, adapter.model, [pixels[i] for i in batch])
        z = own_logits(family, output, ids)
        sizes = [SIZES[i] for i in batch]
        theirs = adapter.processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        for k, i in enumerate(batch):
            assert np.array_equal(logits[i * n : (i + 1) * n], z[k].numpy())
            d = found[i].detections
            assert len(d.score) == n and np.array_equal(d.box, theirs[k]["boxes"].numpy()[d.row])
            best = z[k].sigmoid().flatten().sort(descending=True).values[:n]
            assert np.allclose(d.score, best, rtol=0, atol=1e-6)
            if family.startswith("owl"):
                assert torch.allclose(theirs[k]["scores"], z[k].amax(1).sigmoid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", PROMPTED)
def test_the_detector_is_described_and_left_as_it_was(family: str, draw: Callable[..., Any]) -> None:
    adapter, pixels = open_family(family), [draw(40, 60), draw(40, 60, 1)]
    before, ids = own_output(family, adapter.model, pixels)
    d, n = adapter.detector, len(PROMPTS)
    assert (d.num_classes, d.outputs, d.activation, d.nms_iou) == (n, n, "sigmoid", 1.0)
    assert (d.max_detections, d.feature_size) == (QUERIES[family], 32 + (n if "dino" in family else 1))
    assert d.settings["prompts"] == PROMPTS and d.digest == adapter.classifier().digest()
    a, b = adapter.rois(pixels)
    assert np.array_equal(np.stack([a.logits, b.logits]), own_logits(family, before, ids).numpy())
    again, _ = own_output(family, adapter.model, pixels)
    assert torch.equal(again.logits, before.logits) and torch.equal(again.pred_boxes, before.pred_boxes)
    hooks = [h for m in adapter.model.modules() for h in m._forward_pre_hooks.values()]
    assert not [h for h in hooks if h.__module__.startswith("calib")]
    assert adapter.roi_map is None and adapter.mask_branch is None


@pytest.mark.parametrize("family", ["owlvit", "grounding-dino"])
def test_another_checkpoint_or_other_prompts_are_another_detector(family: str) -> None:
    digests = {
        open_family(family).detector.digest,
        open_family(family, ["cat", "dog", "cow", "hen"]).detector.digest,
        open_family(family, seed=1).detector.digest,
    }
    assert len(digests) == 3 and open_family(family).detector.digest in digests


def test_a_class_has_the_tokens_of_its_prompt_and_no_others() -> None:
    adapter = open_family("grounding-dino", ["Kind 0", " a b", "b"])
    own = ["[CLS]", *"kind0", ".", "a", "b", ".", "b", "."]
    kinds = [-1, *[0] * 5, -1, 1, 1, -1, 2, -1]
    assert adapter._class_of[: len(own)].tolist() == kinds and (adapter._class_of[len(own) :] == -1).all()


def test_prompts_go_by_their_names_else_by_ascending_id(document: Document, read: Read) -> None:
    dataset = read(document(SIZES[:1]))

    def order(*prompts: str) -> list[int]:
        found = in_class_order(open_family("owlvit", list(prompts)), dataset)
        return found.categories.category_id.tolist()

    assert order("kind 2", "kind 0", "kind 3", "kind 1") == [30, 10, 40, 20]
    assert order("a cat", "a dog", "a cow", "a hen") == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("family", "prompts"),
    [
        ("owlvit", []),
        ("owlvit", ["cat", "Cat "]),
        ("owlvit", ["cat", " "]),
        ("owlvit", ["cat" * 20]),
        ("grounding-dino", ["cat.dog", "cow"]),
        ("grounding-dino", ["a" * TOKENS]),
    ],
)
def test_prompts_that_the_detector_does_not_take_are_refused(family: str, prompts: list[str]) -> None:
    with pytest.raises(InputError):
        TextAdapter(*build_prompted(family), family, CPU, prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def save(family: str) -> Path:
        out = tmp_path_factory.mktemp("checkpoint") / family
        for part in build_prompted(family):
            part.save_pretrained(out)
        return out

    return save


@pytest.mark.parametrize("family", ["owlv2", "grounding-dino"])
def test_a_checkpoint_folder_is_extracted_and_heads_are_trained(
    family: str,
    folder: Callable[[str], Path],
    document: Document,
    calib: Callable[..., Any],
    fails: Callable[..., str],
    tmp_path: Path,
) -> None:
    checkpoint, annotations = folder(family), tmp_path / "a.json"
    adapter = open_detector(str(checkpoint), CPU, arguments=json.dumps({"prompts": PROMPTS}))
    boxes = adapter.rois([picture(*SIZES[0], 0)])[0].proposals[:3]
    objects = [(1, 10 * (k + 1), *map(float, (*b[:2], *(b[2:] - b[:2])))) for k, b in enumerate(boxes)]
    annotations.write_text(json.dumps(document(SIZES, objects)))
    common = ["--annotations", annotations, "--images", tmp_path / "images", "--detector", f"transformers:{checkpoint}"]
    prompts = ["--detector-args", json.dumps({"prompts": str(annotations)})]
    done = calib("extract", *common, *prompts, "--mode", "train", "--out", tmp_path / "c")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert Cache(tmp_path / "c").manifest.detector.digest == adapter.detector.digest
    for method, sets in (("natural", ["--set", "steps=3"]), ("tau-norm", []), ("softmax", [])):
        done = calib("train", method, "--cache", tmp_path / "c", "--out", tmp_path / method / "1", *sets)
        assert done.exit_code == 0, done.stderr
    fold = ["--to", "transformers", "--checkpoint", checkpoint, "--out", tmp_path / "new"]
    head = [tmp_path / "natural" / "1", "--cache", tmp_path / "c"]
    assert "prompts" in fails("export", *head, *fold)
    assert "prompts" in fails("extract", *common, "--out", tmp_path / "d")


def test_arguments_and_folders_that_do_not_fit_are_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = folder("owlvit")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "config.json").write_text('{"model_type": "grounding-dino"}')
    cases: list[tuple[Path, dict[str, Any], type[CalibError]]] = [
        (checkpoint, {"prompts": []}, InputError),
        (checkpoint, {"prompts": ["cat", 1]}, InputError),
        (checkpoint, {"prompts": ["cat"], "labels": [0]}, InputError),
        (checkpoint, {"prompts": str(tmp_path / "absent.json")}, MissingFileError),
        (checkpoint, {"prompts": str(tmp_path / "other.json")}, FormatError),
        (tmp_path / "dino", {"prompts": ["cat"]}, MissingFileError),
    ]
    for where, arguments, error in cases:
        with pytest.raises(error):
            open_detector(str(where), CPU, arguments=json.dumps(arguments))
