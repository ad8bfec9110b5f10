"""A cache of a cascade: one row per RoI and stage, every stage a cache like that of a detector of one stage."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calib.cache import Cache, Classifier
from calib.cache.archive import archive, unpack
from calib.cache.damage import find_damage
from calib.cache.merge import merge
from calib.cache.repair import repair
from calib.cache.rewrite import compact, sample
from calib.cache.schema import Manifest
from calib.cache.summary import summarise
from calib.errors import ShapeError, UnsupportedError
from calib.layout import MANIFEST
from tests.toy import Toy

STAGES = 3


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy(stages=STAGES).write(tmp_path_factory.mktemp("cascade") / "c")


def test_every_stage_reads_like_a_cache_of_its_own(cascade: Cache) -> None:
    assert len(cascade.stages) == STAGES and cascade.stages[0] is cascade.stages[0]
    assert json.loads((cascade.path / MANIFEST).read_text())["version"] == 2
    first = cascade.stages[0]
    for k, stage in enumerate(cascade.stages):
        number, roi, label = stage.meta("stage", "roi_id", "label")
        assert (number == k).all() and np.array_equal(label, stage.labels)
        assert np.array_equal(roi, first.meta("roi_id")[0])
        x, logits = stage.features.read(0, stage.n_rows), stage.logits
        assert logits is not None
        # Products of other numbers of rows may have other last bits.
        np.testing.assert_allclose(stage.classifier.logits(x), logits.read(0, stage.n_rows), rtol=1e-5, atol=1e-6)
        assert stage.manifest.detector.digest == stage.classifier.digest()
        assert stage.stages == (stage,)
    features = [s.features.read(0, s.n_rows) for s in cascade.stages]
    assert not np.array_equal(features[0], features[1]) and not np.array_equal(features[1], features[2])
    assert len({s.digest for s in (cascade, *cascade.stages)}) == STAGES + 1


def test_the_whole_has_no_rows_that_could_be_taken_for_all(cascade: Cache) -> None:
    for read in (
        lambda: cascade.features,
        lambda: cascade.logits,
        lambda: cascade.labels,
        lambda: cascade.meta("label"),
    ):
        with pytest.raises(UnsupportedError, match="cascade of 3 stages"):
            read()


def test_a_cache_of_one_stage_is_written_as_before(tmp_path: Path) -> None:
    cache = Toy().write(tmp_path / "c")
    assert json.loads((tmp_path / "c" / MANIFEST).read_text())["version"] == 1
    assert cache.stages == (cache,)
    content = json.loads((tmp_path / "c" / MANIFEST).read_text())
    for name in ("stages", "average"):  # of a cache written before there were cascades
        del content["detector"][name]
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(content))
    assert Manifest.read(tmp_path / "c") == cache.manifest


def test_rewritten_merged_and_archived_stages_keep_their_bits(cascade: Cache, tmp_path: Path) -> None:
    compact(cascade.path, tmp_path / "compact", rows_per_shard=20)
    other = Toy(stages=STAGES, images=12).write(tmp_path / "other")
    archive(cascade.path, tmp_path / "archive")
    unpack(tmp_path / "archive", tmp_path / "again")
    assert Cache(tmp_path / "again").digest == cascade.digest == other.digest
    for k, stage in enumerate(cascade.stages):
        again = Cache(tmp_path / "compact").stages[k]
        assert np.array_equal(again.features.read(0, again.n_rows), stage.features.read(0, stage.n_rows))
        assert again.meta_of(np.arange(again.n_rows)).equals(stage.meta_of(np.arange(stage.n_rows)))
    sample(cascade.path, tmp_path / "five", images=5)
    assert {len(s.labels) for s in Cache(tmp_path / "five").stages} == {Cache(tmp_path / "five").n_rows}
    one, two = (tmp_path / name for name in ("one", "two"))
    sample(cascade.path, one, images=12)
    with pytest.raises(Exception, match="differ in detector"):
        merge([one, Toy(images=12).write(two).path], tmp_path / "merged")
    with pytest.raises(Exception, match="image 1 is in"):
        merge([one, cascade.path], tmp_path / "merged")


def test_a_damaged_file_of_a_later_stage_is_found_and_taken_out(cascade: Cache, copied: Callable[[Path], Path]) -> None:
    path = copied(cascade.path)
    file = path / "shards" / "00001" / "features.2.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (damage,) = find_damage(path).damages
    assert damage.file.endswith("features.2.parquet") and damage.image_ids
    assert repair(path).shards == ("00001",)
    sound = Cache.sound_part(path)
    assert [s.features.shape[0] for s in sound.stages] == [sound.n_rows] * STAGES


def test_classifiers_of_all_stages_come_back_and_must_fit(cascade: Cache, tmp_path: Path) -> None:
    c = cascade.classifier
    c.write(tmp_path / "c.safetensors")
    again = Classifier.read(tmp_path / "c.safetensors")
    assert again.digest() == c.digest() and len(again.stages) == STAGES
    assert [s.digest() for s in again.stages] == [s.digest() for s in c.stages]
    with pytest.raises(ShapeError, match="one for all stages"):
        Classifier(c.weight, c.bias, next=(Classifier(c.weight[:, :-1], c.bias),))
    with pytest.raises(TypeError, match="stage2"):
        Classifier.of({"weight": c.weight, "stage2.weight": c.weight})
    metrics = summarise(cascade.path)
    assert metrics["stages"] == STAGES and metrics["rows"] == cascade.n_rows
