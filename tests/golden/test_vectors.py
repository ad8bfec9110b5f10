"""Values measured on reference implementations, against the code that users run.

CALIB_GOLDEN=FOLDER runs the cases of another folder: sizes, seeds and hyper-parameters are all read from the case.
A case is NAME.npz (arrays) with NAME.json (what they are). NAME is a family's name, alone or followed by an underscore
and anything; which form of the method it is follows from its arrays. Every case must run and every array be used.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from . import (
    bags,
    balance,
    box_size,
    crt,
    disalign,
    pcb,
    posthoc,
    rfs,
    seesaw,
    sigmoids,
    simcal,
    softmaxes,
    tau_norm,
    tde,
    text,
)
from .case import Case

OWN = Path(__file__).parent / "cases"
FOLDER = Path(os.environ.get("CALIB_GOLDEN") or OWN)

FAMILIES: dict[str, Callable[[Case], None]] = {
    "taunorm": tau_norm.check,
    "simcal": simcal.check,
    "bags": bags.check,
    "disalign": disalign.check,
    "crt": crt.check,
    "seesaw": seesaw.check,
    "pcb": pcb.check,
    "eql": sigmoids.check_eql,
    "eqlv2": sigmoids.check_eql_v2,
    "loce": balance.check_loce,
    "bacl": balance.check_bacl,
    "fasa": balance.check_fasa,
    "gol": sigmoids.check_gol,
    "ecm": sigmoids.check_ecm,
    "efl": sigmoids.check_efl,
    "balanced_sigmoid": sigmoids.check_balanced,
    "balanced_softmax": softmaxes.check_balanced,
    "focal": softmaxes.check_focal,
    "class_margin": softmaxes.check_margin,
    "logit_adjust": softmaxes.check_logit_adjustment,
    "reweight": softmaxes.check_reweight,
    "group_softmax": softmaxes.check_group_softmax,
    "norcal": posthoc.check_norcal,
    "logn": posthoc.check_logn,
    "fracal": posthoc.check_fracal,
    "iif": posthoc.check_iif,
    "lws": posthoc.check_lws,
    "ncm": posthoc.check_ncm,
    "cosine_classifier": posthoc.check_cosine,
    "cosine_classifiers": posthoc.check_cosine,
    "tde": tde.check,
    "box_size": box_size.check,
    "text": text.check,
    "rfs": rfs.check,
}


def cases(folder: Path) -> list[Path]:
    """Paths without suffix: every .npz, and every .json of a family's name, whose other half must be there too."""
    arrays = {p.with_name(p.name.removesuffix(".npz")) for p in folder.glob("*.npz")}
    texts = {p.with_name(p.name.removesuffix(".json")) for p in folder.glob("*.json")}
    return sorted(arrays | {p for p in texts if families(p.name)})


def families(name: str) -> list[str]:
    """Families whose name a case's name begins with."""
    return [f for f in FAMILIES if name == f or name.startswith(f + "_")]


def family(name: str) -> str:
    """The family of a case's name: the longest that fits."""
    known = families(name)
    assert known, f"case {name} belongs to no known family: {', '.join(FAMILIES)}"
    return max(known, key=len)


def run(path: Path) -> None:
    """Check one case."""
    check = FAMILIES[family(path.name)]
    case = Case(path)
    check(case)
    case.finish()


def test_there_are_cases() -> None:
    found = {family(p.name) for p in cases(FOLDER)}
    assert found, f"no case (*.npz with *.json) of {', '.join(FAMILIES)} in {FOLDER}"
    if FOLDER == OWN:
        assert found == set(FAMILIES)


@pytest.mark.parametrize("path", cases(FOLDER), ids=lambda p: p.name)
def test_case(path: Path) -> None:
    run(path)


@pytest.mark.parametrize("name", ["bagss_a", "bags2", "crt-b", "taunorma", "simcal3fc_a", "unheard_of"])
def test_a_name_of_no_family_fails(name: str) -> None:
    with pytest.raises(AssertionError, match=f"case {name} belongs to no known family"):
        run(Path(name))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """``copy(name, to, **arrays)``: one of our cases under another name, with arrays added or replaced."""

    def make(name: str, to: str | None = None, **arrays: np.ndarray) -> Path:
        out = tmp_path / (to or name)
        with np.load(OWN / f"{name}.npz") as given:
            np.savez(f"{out}.npz", **(dict(given) | arrays))
        shutil.copy(OWN / f"{name}.json", f"{out}.json")
        return out

    return make


@pytest.mark.parametrize("name", sorted({p.name for p in cases(OWN)}))
def test_an_array_that_nobody_looks_at_fails(name: str, copy: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError, match=r"nothing looks at \['surprise'\]"):
        run(copy(name, surprise=np.zeros(3, np.float32)))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_form_of_a_known_family_fails(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / f"{name}_new.npz", X=np.zeros((2, 3), np.float32), answer=np.zeros(2, np.float32))
    (tmp_path / f"{name}_new.json").write_text('{"hyper": {"tau": 1.0}}')
    with pytest.raises((KeyError, AssertionError)):
        run(tmp_path / f"{name}_new")


def test_another_name_of_a_known_form_runs(copy: Callable[..., Path]) -> None:
    run(copy("simcal_dual_cocolt_a", "simcal_b.2"))
    run(copy("taunorm_orig_tau05", "taunorm"))


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_half_a_case_fails(suffix: str, copy: Callable[..., Path]) -> None:
    path = copy("crt")
    Path(f"{path}{suffix}").unlink()
    assert cases(path.parent) == [path]
    with pytest.raises(FileNotFoundError):
        run(path)


def test_one_wrong_number_fails(copy: Callable[..., Path]) -> None:
    with np.load(OWN / "bags_beta8.npz") as arrays:
        scores = arrays["scores"].copy()
    scores[-1, -1] += 3e-5 + 3e-5 * abs(scores[-1, -1])
    with pytest.raises(AssertionError, match="bags_beta8 scores: off by"):
        run(copy("bags_beta8", scores=scores))
