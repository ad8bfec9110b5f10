"""Values measured on reference implementations, against the code that users run.

CALIB_GOLDEN=FOLDER runs the cases of another folder: sizes, seeds and hyper-parameters are all read from the case.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from . import bags, crt, disalign, simcal, tau_norm
from .case import Case

FOLDER = Path(os.environ.get("CALIB_GOLDEN") or Path(__file__).parent / "cases")

FAMILIES: dict[str, Callable[[Case], None]] = {
    "taunorm": tau_norm.check,
    "simcal": simcal.check,
    "bags": bags.check,
    "disalign": disalign.check,
    "crt": crt.check,
}
CASES = sorted(FOLDER.glob("*.npz"))


def family(name: str) -> str:
    """The longest known prefix of a case's name."""
    known = [f for f in FAMILIES if name == f or name.startswith(f + "_")]
    assert known, f"case {name} belongs to no known family: {', '.join(FAMILIES)}"
    return max(known, key=len)


def test_there_are_cases() -> None:
    assert CASES, f"no case (*.npz) in {FOLDER}"
    if "CALIB_GOLDEN" not in os.environ:
        assert {family(p.stem) for p in CASES} == set(FAMILIES)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_case(path: Path) -> None:
    case = Case(path)
    FAMILIES[family(case.name)](case)
    case.finish()
