"""Paths become views: recognised by what they hold, told apart by their names, read through the manifest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib.analysis import SOURCES, open_views, query
from calib.errors import CalibError, FormatError, InputError, MissingFileError, VersionError

MakeCache = Callable[[str], Path]


def test_every_view_exists_if_its_data_was_given(
    runs: list[Path], judged_run: Path, make_cache: MakeCache, detections_file: Path
) -> None:
    cache = make_cache("train")
    pq.write_table(pa.table({"id": [1], "image_id": [1]}), cache / "annotations.parquet")
    with open_views([*runs, judged_run, cache, detections_file]) as views:
        assert views.names == set(SOURCES)
        assert views.runs == ["old", "new", "seen"]
    with open_views(runs) as views:
        assert views.names == {"results", "summary"}


def test_results_carry_the_name_of_their_folder(runs: list[Path]) -> None:
    answer = query(runs, "SELECT run, round(AP, 6) FROM results WHERE category_id = 1 ORDER BY run")
    assert answer.rows == (("new", 1.0), ("old", 0.0))


def test_summaries_are_one_row_per_run(runs: list[Path]) -> None:
    answer = query(runs, "SELECT run, n, round(AP, 6), round(AP3, 6), max_detections FROM summary ORDER BY 1")
    assert answer.rows == (("new", 4, 0.75, 0.5, 300), ("old", 4, 0.625, 1.0, 300))


def test_only_shards_of_the_manifest_are_read(make_cache: MakeCache) -> None:
    answer = query([make_cache("a"), make_cache("b")], "SELECT cache, count(*) FROM meta GROUP BY 1 ORDER BY 1;")
    assert answer.rows == (("a", 6), ("b", 6))


def test_the_classifier_is_joined_by_index(make_cache: MakeCache) -> None:
    answer = query(
        [make_cache("a")],
        "SELECT name, weight_norm, bias FROM classifier LEFT JOIN categories USING (cache, index) ORDER BY 3",
    )
    assert answer.rows == (
        *(("newt", 5.0, 0.0), ("owl", 10.0, 1.0), ("pig", 15.0, 2.0), ("rat", 20.0, 3.0), ("yak", 5.0, 4.0)),
        (None, 1.0, 5.0),
    )


def test_detections_carry_the_name_of_their_file(detections_file: Path) -> None:
    answer = query([detections_file], "SELECT run, category_id, count(*) FROM detections GROUP BY ALL ORDER BY 2")
    assert answer.rows == (("dets", 1, 2), ("dets", 2, 1), ("dets", 3, 1))


def test_names_are_data_not_sql_or_patterns(runs: list[Path], tmp_path: Path) -> None:
    strange = tmp_path / "o'ld [n]*"
    shutil.copytree(runs[0], strange)
    shutil.copytree(runs[1], tmp_path / "o'ld n")  # what the name would match as a pattern
    answer = query([strange], "SELECT DISTINCT run, round(AP, 6) FROM results WHERE category_id = 1")
    assert answer.rows == (("o'ld [n]*", 0.0),)


def test_two_inputs_of_one_name_are_refused(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "other" / "old")
    for paths in ([runs[0], tmp_path / "other" / "old"], [runs[0], runs[0]]):
        with pytest.raises(InputError, match="two inputs of kind run are called 'old'"):
            query(paths, "SELECT 1")


def _no_summary(runs: list[Path], cache: Path) -> Path:
    (runs[0] / "summary.json").unlink()
    return runs[0]


def _no_columns(runs: list[Path], cache: Path) -> Path:
    pq.write_table(pa.table({"category_id": [1]}), runs[0] / "per_category.parquet")
    return runs[0]


def _damaged(runs: list[Path], cache: Path) -> Path:
    (runs[0] / "per_category.parquet").write_bytes(b"PAR1 and no more")
    return runs[0]


def _no_shard(runs: list[Path], cache: Path) -> Path:
    (cache / "shards" / "00001" / "meta.parquet").unlink()
    return cache


def _other_version(runs: list[Path], cache: Path) -> Path:
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    return cache


def _no_classifier(runs: list[Path], cache: Path) -> Path:
    (cache / "classifier.safetensors").write_bytes(b"\0" * 20)
    return cache


def _empty_folder(runs: list[Path], cache: Path) -> Path:
    return cache / "shards"


def _text(runs: list[Path], cache: Path) -> Path:
    (cache / "notes.txt").write_text("hello")
    return cache / "notes.txt"


def _absent(runs: list[Path], cache: Path) -> Path:
    return cache / "absent"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_no_summary, MissingFileError, "summary of results not found"),
        (_no_columns, FormatError, "per_category.parquet has no column AP, AP50, AR"),
        (_damaged, FormatError, "per_category.parquet cannot be read as Parquet"),
        (_no_shard, MissingFileError, "the cache has lost .*00001"),
        (_other_version, VersionError, "99"),
        (_no_classifier, FormatError, "classifier.safetensors"),
        (_empty_folder, FormatError, "neither a result folder .* nor a feature cache"),
        (_text, FormatError, "notes.txt cannot be read as Parquet"),
        (_absent, MissingFileError, "path not found: .*absent"),
    ],
)
def test_damaged_inputs_are_named(
    runs: list[Path],
    make_cache: MakeCache,
    damage: Callable[[list[Path], Path], Path],
    kind: type[CalibError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        open_views([damage(runs, make_cache("cache"))])
