"""Settings from text and TOML: types are kept, and what is unknown or out of range is named with its neighbours."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import FormatError, MissingFileError, SettingError
from calib.settings import Loop, Nms, known_keys, parse_assignments, read_toml, with_overrides


@dataclass(frozen=True)
class Sample:
    """One of every type."""

    beta: float = 8.0
    groups: int = 4
    cosine: bool = False
    name: str = "plain"
    edges: tuple[int, ...] = (10, 100)
    limit: float | None = None
    loop: Loop = field(default_factory=Loop)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("beta", "2", 2.0),
        ("beta", "1e-3", 0.001),
        ("groups", "7", 7),
        ("cosine", "true", True),
        ("cosine", "No", False),
        ("name", "a=b", "a=b"),
        ("edges", "1,20,300", (1, 20, 300)),
        ("edges", "", ()),
        ("limit", "none", None),
        ("limit", "3", 3.0),
    ],
)
def test_text_is_read_by_the_fields_type(key: str, text: str, value: object) -> None:
    found = getattr(with_overrides(Sample(), parse_assignments([f"{key}={text}"])), key)
    assert found == value and type(found) is type(value)


def test_a_key_of_the_loop_needs_no_table() -> None:
    s = with_overrides(Sample(), parse_assignments(["lr=0.1", "loop.steps=9", "weight-decay=0", "milestones=.5"]))
    assert (s.loop.lr, s.loop.steps, s.loop.weight_decay, s.loop.milestones) == (0.1, 9, 0, (0.5,))
    assert Sample().loop.lr == 0.02  # the original is as it was


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("bta=1", "unknown setting 'bta'. Did you mean 'beta'?"),
        ("loop.lrr=1", "unknown setting 'loop.lrr'. Did you mean 'loop.lr'?"),
        ("zzz=1", "unknown setting 'zzz'"),
        ("beta=much", "setting 'beta' is 'much': expected float"),
        ("beta=nan", "setting 'beta' is 'nan': expected float"),
        ("beta=inf", "setting 'beta' is 'inf': expected float"),
        ("groups=2.5", "setting 'groups' is '2.5': expected int"),
        ("cosine=maybe", "setting 'cosine' is 'maybe': expected bool"),
        ("edges=1,b", "setting 'edges' is '1,b': expected tuple[int, ...]"),
        ("limit=x", "setting 'limit' is 'x': expected float | None"),
        ("lr=-1", "lr is -1.0: expected at least 0"),
        ("steps=0", "steps is 0: expected at least 1"),
        ("momentum=7", "momentum is 7.0: expected less than 1"),
        ("milestones=8000,11000", "milestones are 8000, 11000: expected shares of steps"),
        ("schedule=linear", "schedule is 'linear': expected one of steps, cosine"),
    ],
)
def test_what_is_wrong_is_named(assignment: str, message: str) -> None:
    with pytest.raises(SettingError) as e:
        with_overrides(Sample(), parse_assignments([assignment]))
    assert message in str(e.value)


def test_a_setting_needs_a_value() -> None:
    with pytest.raises(SettingError, match="'beta' is no setting: expected key=value"):
        parse_assignments(["beta"])


def test_toml_tables_become_dotted_keys(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('beta = 2\nedges = [1, 2]\n[loop]\nlr = 0.5\nschedule = "cosine"\n')
    found = with_overrides(Sample(), read_toml(tmp_path / "s.toml"))
    assert (found.beta, found.edges, found.loop.lr, found.loop.schedule) == (2.0, (1, 2), 0.5, "cosine")


@pytest.mark.parametrize(
    ("text", "message"),
    [("groups = 2.0", "'groups' is '2.0'"), ("groups = true", "'groups'"), ("beta = false", "'beta'")],
)
def test_toml_types_are_not_bent(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(SettingError, match=message):
        with_overrides(Sample(), read_toml(tmp_path / "s.toml"))


def test_a_settings_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"settings file not found: .*s\.toml"):
        read_toml(tmp_path / "s.toml")
    for content in (b"beta 3", b"\xff\xff"):
        (tmp_path / "s.toml").write_bytes(content)
        with pytest.raises(FormatError, match=r"s\.toml is not valid TOML"):
            read_toml(tmp_path / "s.toml")


def test_all_keys_are_listed() -> None:
    keys = known_keys(Sample())
    assert keys["beta"] == 8.0 and keys["loop.lr"] == 0.02 and "loop" not in keys
    assert len(keys) == 6 + len(known_keys(Loop()))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"score_threshold": -0.1}, {"score_threshold": 1.1}, {"max_detections": 0}),
        *({"nms_iou": 2}, {"nms_iou": float("nan")}),
    ],
)
def test_nms_thresholds_have_ranges(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Nms(**wrong)


def test_numbers_of_numpy_are_numbers() -> None:
    found = with_overrides(Sample(), {"groups": np.int64(3), "beta": np.float32(0.5), "edges": [1, 2]})
    assert (found.groups, found.beta, found.edges) == (3, 0.5, (1, 2)) and type(found.groups) is int
    for wrong in ({"edges": 5}, {"groups": np.bool_(True)}, {"beta": "1,2"}):
        with pytest.raises(SettingError):
            with_overrides(Sample(), wrong)
