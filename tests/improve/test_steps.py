"""Steps that are done once: skipped, gone on with, done again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.errors import ExistsError
from calib.improve.steps import Step, Steps, check_place


def steps_of(out: Path) -> Steps:
    return Steps(out, 1, lambda line: None)


def counting(out: Path, inputs: dict[str, Any], calls: list[bool], *, breaks: bool = False, **more: Any) -> Step:
    """Writes a file into its folder, and notes whether there was one."""

    def do() -> dict[str, Any]:
        folder = out / "made"
        calls.append(folder.exists())
        folder.mkdir(exist_ok=True)
        if breaks:
            raise KeyboardInterrupt
        return {"calls": len(calls), "path": ("a", 1)}

    return Step("make", inputs, (out / "made",), do, **more)


def test_a_step_is_done_once_for_the_same_inputs(tmp_path: Path) -> None:
    out, calls = tmp_path / "run", list[bool]()
    first = steps_of(out).run(counting(out, {"a": 1}, calls))
    again = steps_of(out)
    assert again.run(counting(out, {"a": 1}, calls)) == first == {"calls": 1, "path": ["a", 1]}
    assert again.done == [] and calls == [False]


def test_other_inputs_remove_what_was_made_of_the_old_ones(tmp_path: Path) -> None:
    out, calls = tmp_path / "run", list[bool]()
    for inputs in ({"a": 1}, {"a": 2}):
        steps_of(out).run(counting(out, inputs, calls))
    assert calls == [False, False]


def test_a_larger_budget_goes_on_with_what_is_there(tmp_path: Path) -> None:
    out, calls = tmp_path / "run", list[bool]()
    for budget in ({"trials": 1}, {"trials": 2}, {"trials": 2}):
        steps_of(out).run(counting(out, {}, calls, budget=budget))
    assert calls == [False, True]


def test_an_interrupted_step_goes_on_and_a_lost_output_is_made_again(tmp_path: Path) -> None:
    out, calls = tmp_path / "run", list[bool]()
    with pytest.raises(KeyboardInterrupt):
        steps_of(out).run(counting(out, {}, calls, breaks=True))
    steps_of(out).run(counting(out, {}, calls))
    (out / "made").rmdir()
    steps_of(out).run(counting(out, {}, calls))
    assert calls == [False, True, False]


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_text("ha")])
def test_a_file_that_is_lost_or_cut_is_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    out, made = tmp_path / "run", list[bool]()

    def do() -> dict[str, Any]:
        made.append((out / "made").exists())
        (out / "made").mkdir()
        (out / "made" / "whole").write_text("half")
        return {}

    step = Step("make", {}, (out / "made",), do)
    steps_of(out).run(step)
    (out / "made" / "more").write_text("of somebody else")
    steps_of(out).run(step)
    damage(out / "made" / "whole")
    steps_of(out).run(step)
    assert made == [False, False] and (out / "made" / "whole").read_text() == "half"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExistsError):
        check_place(tmp_path)
    with pytest.raises(ExistsError):
        check_place(tmp_path / "notes.txt")
