"""Categories, the classifier's file and the class index."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from calib.annotations import Annotations
from calib.cache import Cache, Categories, Classifier
from calib.cache.index import ClassIndex
from calib.errors import FormatError, InputError, MissingFileError, ShapeError


def of(records: list[dict[str, Any]], pairs: list[tuple[int, int]] | None = None) -> Categories:
    """Categories of a json whose annotations are of these (category, image)."""
    annotations = [
        {"id": k, "category_id": c, "image_id": i, "bbox": [0, 0, 1, 1], "area": 1}
        for k, (c, i) in enumerate(pairs or [])
    ]
    images = [{"id": i} for i in {i for _, i in pairs or []}]
    document = {"images": images, "categories": records, "annotations": annotations}
    return Categories.of(Annotations.from_document(document, Path("a.json")))


def test_categories_are_sorted_by_id_and_counted_where_the_file_does_not() -> None:
    records: list[dict[str, Any]] = [{"id": 9, "name": "c"}, {"id": 2, "name": "a"}, {"id": 5}]
    pairs = [(9, 1), (9, 1), (9, 2), (2, 1)]
    categories = of(records, pairs)
    assert categories.category_id.tolist() == [2, 5, 9] and categories.name == ("a", "5", "c")
    assert categories.instance_count.tolist() == [1, 0, 3]
    assert categories.image_count.tolist() == [1, 0, 2]


def test_the_files_own_counts_go_before() -> None:
    """LVIS: TRAIN counts stand in every split's json; frequency follows from images: 1-10 r, 11-100 c, above f."""
    images = {1: 10, 2: 11, 3: 100, 4: 101}
    records = [{"id": i, "instance_count": 7 * n, "image_count": n} for i, n in images.items()]
    categories = of(records)
    assert categories.instance_count.tolist() == [70, 77, 700, 707]
    assert categories.frequency == ("r", "c", "c", "f")


def test_ids_become_indices() -> None:
    categories = of([{"id": i} for i in (2, 5, 9)])
    assert categories.index_of(np.asarray([9, 2, 2])).tolist() == [2, 0, 0]
    for strange in (3, 10, 1):
        with pytest.raises(InputError, match=f"category id {strange}, which is no category"):
            categories.index_of(np.asarray([5, strange]))


def test_categories_come_back(tmp_path: Path) -> None:
    written = of([{"id": 3, "name": "é", "frequency": "r"}, {"id": 1, "name": "b", "frequency": "f"}])
    written.write(tmp_path / "c.parquet")
    read = Categories.read(tmp_path / "c.parquet")
    assert read.name == ("b", "é") and read.frequency == written.frequency
    assert np.array_equal(read.category_id, [1, 3])
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(FormatError, match=r"c\.parquet"):
        Categories.read(tmp_path / "c.parquet")


def test_logits_by_hand() -> None:
    """Linear: (1, 2).(1, 0) + 0.5 = 1.5 and (1, 2).(0, 3) - 1 = 5. Cosine, scale 10: x = (3, 4) / 5, W rows of unit
    length after division: 10 * 0.6 = 6 and 10 * 0.8 = 8."""
    x, w = np.asarray([[1, 2]], np.float32), np.asarray([[1, 0], [0, 3]], np.float32)
    assert Classifier(w, np.asarray([0.5, -1], np.float32)).logits(x).tolist() == [[1.5, 5]]
    cosine = Classifier(w, scale=np.asarray([10], np.float32))
    assert cosine.logits(np.asarray([[3, 4]], np.float32)) == pytest.approx(np.asarray([[6, 8]]))


def test_a_classifier_comes_back_and_keeps_its_digest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((4, 5)).astype(np.float32), np.zeros(4, np.float32)
    written = Classifier(weight, bias)
    written.write(tmp_path / "c.safetensors")
    read = Classifier.read(tmp_path / "c.safetensors")
    assert read.digest() == written.digest() and np.array_equal(read.weight, weight) and read.scale is None
    bias[3] = 1e-30
    assert Classifier(weight, bias).digest() != read.digest()


def test_a_foreign_classifier_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(MissingFileError):
        Classifier.read(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(FormatError, match=r"c\.safetensors cannot be read"):
        Classifier.read(path)
    save_file({"weight": np.zeros((4, 5), np.float32), "other": np.zeros(1)}, path)
    with pytest.raises(FormatError, match="other"):
        Classifier.read(path)
    for tensors in ({"weight": np.zeros(4)}, {"weight": np.zeros((4, 5)), "bias": np.zeros(3)}):
        save_file(tensors, path)
        with pytest.raises(ShapeError, match=r"expected \[C\+1, D\], \[C\+1\]"):
            Classifier.read(path)


def test_the_class_index_finds_the_rows_of_a_label(write_cache: Callable[..., Path]) -> None:
    cache = Cache(write_cache())
    index = ClassIndex.build(cache)
    labels: Any = cache.labels
    image = np.repeat([0, 2, 3, 4, 5], [4, 7, 6, 1, 3])
    assert np.array_equal(index.image, image)
    assert index.present.tolist() == [c for c in range(3) if (labels == c).any()]
    for label in range(4):
        rows = np.flatnonzero(labels == label)
        assert np.array_equal(index.rows(label), rows)
        assert index.images(label).tolist() == sorted(set(image[rows].tolist()))
        for i in range(6):
            assert np.array_equal(index.rows_in_image(label, i), rows[image[rows] == i])
