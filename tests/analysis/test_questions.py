"""The shipped questions: answers worked out by hand, and clear words when something is missing."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib.analysis import VARIABLES, Answer, ask, open_views, query, questions
from calib.cache import Manifest
from calib.errors import FormatError, InputError, SettingError, UnknownNameError

AB = {"a": "old", "b": "new"}


def column(answer: Answer, name: str) -> list[Any]:
    values = [row[name] for row in answer.records()]
    return [round(value, 6) if isinstance(value, float) else value for value in values]


def test_every_question_says_what_it_asks_and_reads() -> None:
    ap = {"ap_per_bin", "bin_difference", "gained_and_lost", "ap_against_count", "norm_against_count"}
    assert set(questions()) == ap | {"false_positive_kinds", "rare_confusion", "score_per_bin", "cut_by_cap"}
    for q in questions().values():
        assert q.description.endswith(".") and len(q.description.splitlines()) == 1, q.name
        assert q.views and set(q.runs + q.options) <= set(VARIABLES), q.name
        for variable in q.runs + q.options:
            assert f"getvariable('{variable}')" in q.sql, q.name


def test_ap_per_bin(runs: list[Path]) -> None:
    answer = ask(runs, "ap_per_bin")
    assert column(answer, "run") == ["new"] * 4 + ["old"] * 4
    assert column(answer, "bin") == [1, 2, 3, 4] * 2
    assert column(answer, "AP") == [1, 0.5, 0.5, 1, 0, 0.5, 1, 1]
    assert column(answer, "n") == [1] * 8
    assert column(answer, "n_absent") == [1, 0, 0, 0] * 2  # category 7 has no object
    assert column(answer, "n_never_detected") == [0, 0, 0, 0, 1, 0, 0, 0]  # nothing found category 1 in old
    assert column(answer, "fewest_instances") == [5, 50, 500, 5000] * 2


def test_bins_may_be_cut_elsewhere(runs: list[Path]) -> None:
    answer = ask(runs[:1], "ap_per_bin", {"bins": "60"})
    assert column(answer, "bin") == [1, 2]
    assert column(answer, "AP") == [0.25, 1.0]
    assert column(answer, "n") == [2, 2]


def test_bin_difference(runs: list[Path]) -> None:
    answer = ask(runs, "bin_difference", AB)
    assert column(answer, "bin") == [1, 2, 3, 4]
    assert column(answer, "difference") == [1, 0, -0.5, 0]
    assert column(answer, "n_gained") == [1, 0, 0, 0]
    assert column(answer, "n_lost") == [0, 0, 1, 0]
    swapped = ask(runs, "bin_difference", {"a": "new", "b": "old"})
    assert column(swapped, "difference") == [-1, 0, 0.5, 0]


def test_gained_and_lost(runs: list[Path]) -> None:
    answer = ask(runs, "gained_and_lost", AB)
    assert column(answer, "name") == ["newt", "pig"]
    assert column(answer, "difference") == [1, -0.5]


def test_gained_and_lost_keeps_the_limit_on_either_side(
    make_result: Callable[[str, dict[int, float]], Path],
) -> None:
    old, new = make_result("old", {3: 1, 4: 1}), make_result("new", {1: 1, 2: 0.5, 4: 0.5})
    assert column(ask([old, new], "gained_and_lost", AB), "name") == ["newt", "owl", "rat", "pig"]
    assert column(ask([old, new], "gained_and_lost", AB | {"limit": "1"}), "name") == ["newt", "pig"]


def test_norm_against_count(make_cache: Callable[[str], Path]) -> None:
    answer = ask([make_cache("train")], "norm_against_count")
    # Doublings of 5 (4-7), 8 (8-15), 50 (32-63), 500 (256-511), 5000 (4096-8191).
    assert column(answer, "fewest_instances") == [5, 8, 50, 500, 5000]
    assert column(answer, "mean_norm") == [5, 5, 10, 15, 20]
    assert column(answer, "mean_bias") == [0, 4, 1, 2, 3]
    x, y = [math.log(1 + n) for n in (5, 8, 50, 500, 5000)], [5, 5, 10, 15, 20]
    mx, my = sum(x) / 5, sum(y) / 5
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    spread = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    assert column(answer, "correlation") == [round(covariance / spread, 6)] * 5


def test_ap_against_count(runs: list[Path]) -> None:
    answer = ask(runs, "ap_against_count")
    assert column(answer, "run") == ["new"] * 4 + ["old"] * 4
    assert column(answer, "AP") == [1, 0.5, 0.5, 1, 0, 0.5, 1, 1]
    assert column(answer, "n_zero") == [0, 0, 0, 0, 1, 0, 0, 0]
    # Ranks of AP 3.5, 1.5, 1.5, 3.5 and 1, 2, 3.5, 3.5 against 1, 2, 3, 4.
    assert column(answer, "rank_correlation")[::4] == [0, round(4.5 / math.sqrt(5 * 4.5), 6)]


def test_false_positive_kinds(judged_run: Path) -> None:
    answer = ask([judged_run], "false_positive_kinds")
    assert column(answer, "bin") == [1, 2, 4]
    assert column(answer, "n_true") == [1, 0, 1] and column(answer, "n_false") == [2, 2, 0]
    assert column(answer, "duplicate") == [1, None, 0] and column(answer, "poor_box") == [1, None, 0]
    few = ask([judged_run], "false_positive_kinds", {"cap": "3"})
    assert column(few, "n_false") == [1, 2, 0]  # the poor box is the fourth of its image


def test_rare_confusion(judged_run: Path) -> None:
    answer = ask([judged_run], "rare_confusion")  # the newt's best box says rat, which nobody judged there
    assert answer.rows == (("seen", "newt", 5, "rat", 5000, 1),)
    every = ask([judged_run], "rare_confusion", {"below": "10000"})
    assert [(r["category"], r["taken_for"]) for r in every.records()] == [("newt", "rat"), ("rat", "rat")]


def test_score_per_bin(judged_run: Path) -> None:
    answer = ask([judged_run], "score_per_bin")
    assert column(answer, "is_true") == [True, False, False, True] and column(answer, "n") == [1, 2, 2, 1]
    assert column(answer, "median") == [0.8, 0.65, 0.75, 0.9]


def test_cut_by_cap(judged_run: Path) -> None:
    assert column(ask([judged_run], "cut_by_cap"), "n_cut") == [0, 0]
    answer = ask([judged_run], "cut_by_cap", {"cap": "1"})
    assert column(answer, "bin") == [1, 4] and column(answer, "n_cut") == [1, 0]
    assert column(answer, "median_rank") == [2, 1]


def test_a_cache_that_was_not_finished_or_is_damaged_is_refused(make_cache: Callable[[str], Path]) -> None:
    cache = make_cache("train")
    shards = cache / "shards"
    shutil.copy(shards / "00000" / "meta.parquet", shards / "00001" / "meta.parquet")
    with pytest.raises(FormatError, match="is not what was written"):
        query([cache], "SELECT count(*) FROM meta")
    replace(Manifest.read(cache), complete=False).write(cache)
    with pytest.raises(InputError, match="is not complete: writing stopped after 2 shards"):
        query([cache], "SELECT count(*) FROM meta")


def test_files_run_by_hand_once_the_views_exist(
    runs: list[Path], judged_run: Path, make_cache: Callable[[str], Path]
) -> None:
    with open_views([*runs, judged_run, make_cache("train")]) as views:
        views.connection.execute("SET VARIABLE a = 'old'; SET VARIABLE b = 'new';")
        for q in questions().values():
            assert views.connection.execute(q.sql).fetchall(), q.name


def test_unknown_counts_have_no_bin(runs: list[Path]) -> None:
    path = runs[0] / "per_category.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("instance_count")
    pq.write_table(table.set_column(at, "instance_count", pa.nulls(5, pa.int64())), path)
    answer = ask(runs[:1], "ap_per_bin")
    assert column(answer, "bin") == [None] and column(answer, "AP") == [0.625]


def test_a_missing_view_names_what_to_add(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="'norm_against_count' needs the view categories") as e:
        ask(runs, "norm_against_count")
    assert e.value.hint == "add a feature cache (calib extract --out CACHE) to the command line"


def test_variables_are_checked(runs: list[Path]) -> None:
    with pytest.raises(SettingError, match="needs to know which run is 'b'") as e:
        ask(runs, "bin_difference", {"a": "old"})
    assert "old, new" in e.value.hint
    with pytest.raises(UnknownNameError, match=r"unknown run 'nwe'. Did you mean 'new'"):
        ask(runs, "bin_difference", {"a": "old", "b": "nwe"})
    with pytest.raises(UnknownNameError, match="unknown variable of question 'ap_per_bin' 'a'"):
        ask(runs, "ap_per_bin", {"a": "old"})
    with pytest.raises(UnknownNameError, match=r"unknown question 'ap_per_bim'. Did you mean 'ap_per_bin'"):
        ask(runs, "ap_per_bim")
    with pytest.raises(InputError, match="Could not convert string 'x'"):
        ask(runs, "ap_per_bin", {"bins": "x"})


def test_sql_of_the_user_sees_views_and_variables(runs: list[Path]) -> None:
    answer = query(runs, "SELECT count(*) AS k FROM results WHERE run = getvariable('a')", {"a": "old"})
    assert answer.columns == ("k",) and answer.rows == ((5,),)
    with pytest.raises(UnknownNameError, match="unknown variable 'c'"):
        query(runs, "SELECT 1", {"c": "x"})


@pytest.mark.parametrize("sql", ["", ";", "-- nothing"])
def test_sql_without_a_statement(runs: list[Path], sql: str) -> None:
    with pytest.raises(InputError, match="no statement"):
        query(runs, sql)


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "abc"])
def test_whole_variables_are_checked(judged_run: Path, value: str) -> None:
    with pytest.raises(SettingError, match="expected a whole number of at least 1"):
        ask([judged_run], "cut_by_cap", {"cap": value})


def test_results_of_an_older_version_lie_beside_new_ones(runs: list[Path]) -> None:
    path = runs[0] / "per_category.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["ARs", "ARm"]), path)
    assert len(query(runs, "SELECT * FROM results WHERE ARs IS NULL").rows) == 5
    assert column(ask(runs, "bin_difference", AB), "difference") == [1, 0, -0.5, 0]


def test_sql_errors_are_passed_on_with_the_views_there_are(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="resulst does not exist") as e:
        query(runs, "SELECT * FROM resulst")
    assert "results, summary" in e.value.hint
