"""Several heads from one reading: each has the bytes that it has alone, whatever else happens."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import active_count
from typing import Any

import numpy as np
import pytest

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import ExistsError, FitError, NonFiniteError, SettingError, UnknownNameError
from calib.training import train
from calib.training.plan import overrides_of

from ..toy import Toy

Content = Callable[[Path], dict[str, bytes]]
QUICK: dict[str, Any] = {"steps": 12, "warmup_steps": 0, "checkpoint_every": 4, "lr": 0.1}
METHODS = ("natural", "bags", "crt", "lws", "simcal", "softmax", "ncm", "pcb", "disalign")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Toy().write(tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = active_count()
    yield
    assert active_count() == before


def alone(methods: tuple[str, ...], cache: Cache, out: Path, overrides: dict[str, Any]) -> None:
    for method, own in overrides_of(list(methods), overrides).items():
        train(method, cache, out / method / "1", own)


def test_together_and_alone_give_the_same_bytes(cache: Cache, tmp_path: Path, content: Content) -> None:
    own = {
        "rows_per_step": 20,
        "disalign.base": "cosine",
        "disalign.base_loop.steps": 5,
        "bags.steps": 9,
        "bags.beta": "4",
    }
    lines: list[str] = []
    heads = train(METHODS, cache, tmp_path / "one", QUICK | own, note=lines.append)
    alone(METHODS, cache, tmp_path / "alone", QUICK | own)
    assert content(tmp_path / "one") == content(tmp_path / "alone")
    assert tuple(heads) == METHODS and heads["bags"].info.settings["beta"] == 4
    assert lines == [
        "one pass for 4 heads: natural, bags, pcb, disalign base",
        "one pass for 2 heads: crt, lws",
        "simcal: no other head takes its batches; trained in a pass of its own",
        "disalign: no other head takes its batches; trained in a pass of its own",
    ]


def test_every_batch_is_read_once(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = RowMatrix.stored

    def stored(self: RowMatrix, rows: Any, out: Any = None) -> Any:
        taken.append(len(rows))
        return real(self, rows, out)

    monkeypatch.setattr(RowMatrix, "stored", stored)
    train(("natural", "bags", "reweight"), cache, tmp_path / "m", QUICK)
    assert len(taken) == 12


def stopping(n: int, kind: type[BaseException]) -> Any:
    """A bar that raises ``kind`` at the n-th step of all heads of a pass together."""

    class Bar:
        done = 0

        def advance(self, k: int = 1, **metrics: float) -> None:
            self.done += k
            if self.done >= n:
                raise kind

    @contextmanager
    def progress(label: str, *, total: int, unit: str) -> Iterator[Any]:
        yield Bar()

    return progress


@pytest.mark.parametrize("at", [1, 14, 23])
def test_interrupted_it_goes_on_to_the_same_bytes(cache: Cache, tmp_path: Path, content: Content, at: int) -> None:
    methods, settings = ("softmax", "natural", "bags", "crt"), QUICK | {"bags.checkpoint_every": 3}
    alone(methods, cache, tmp_path / "alone", settings)
    with pytest.raises(KeyboardInterrupt):
        train(methods, cache, tmp_path / "one", settings, progress=stopping(at, KeyboardInterrupt))
    lines: list[str] = []
    train(methods, cache, tmp_path / "one", settings, note=lines.append)
    assert lines[0] == f"softmax: {tmp_path / 'one' / 'softmax' / '1'} is there already"
    assert content(tmp_path / "one") == content(tmp_path / "alone")


def test_a_head_that_diverges_does_not_stop_the_others(cache: Cache, tmp_path: Path, content: Content) -> None:
    settings = QUICK | {"bags.lr": 1e38}
    with pytest.raises(FitError, match="bags"):
        train(("natural", "bags", "reweight"), cache, tmp_path / "one", settings)
    alone(("natural", "reweight"), cache, tmp_path / "alone", QUICK)
    assert content(tmp_path / "one") == content(tmp_path / "alone")


def test_a_damaged_row_stops_all_that_read_it(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Content
) -> None:
    real = cache.features.stored

    def spoil(rows: Any, out: Any = None) -> Any:
        out = real(rows, out)
        out[-1, -1] = np.inf
        return out

    monkeypatch.setattr(cache.features, "stored", spoil)
    with pytest.raises(NonFiniteError, match="holds NaN"):
        train(("natural", "bags", "softmax"), cache, tmp_path / "one", QUICK)
    assert {name.split("/")[0] for name in content(tmp_path / "one")} == {"softmax"}


def test_what_is_wrong_is_said_before_anything_is_trained(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "one"
    with pytest.raises(UnknownNameError, match="'bag'"):
        train(("natural", "bag"), cache, out)
    with pytest.raises(SettingError, match="natural is named twice"):
        train(("natural", "natural"), cache, out)
    with pytest.raises(SettingError, match=r"'bags.beta' is for bags, which is not trained"):
        train(("natural", "crt"), cache, out, {"bags.beta": 1})
    with pytest.raises(SettingError, match="no method of natural, crt has a setting 'beta'"):
        train(("natural", "crt"), cache, out, {"beta": 1})
    with pytest.raises(SettingError, match="unknown setting 'betta'"):
        train(("natural", "bags"), cache, out, {"bags.betta": 1})
    assert not out.exists()
    train("crt", cache, out / "crt" / "1", QUICK, seed=1)
    with pytest.raises(ExistsError, match="crt/1 exists"):
        train(("natural", "crt"), cache, out, QUICK)
    assert not (out / "natural").exists()
    heads = train(("natural", "crt"), cache, out, QUICK, overwrite=True)
    assert heads["crt"].info.seed == 0


def test_settings_for_one_come_after_those_for_all() -> None:
    given = {"tau-norm.tau": 0.5, "bags.lr": 3, "lr": 2, "tau_norm.form": "original", "loop.steps": 7}
    assert overrides_of(["bags", "tau-norm", "crt"], given) == {
        "bags": {"lr": 3, "loop.steps": 7},
        "tau-norm": {"tau": 0.5, "form": "original"},
        "crt": {"lr": 2, "loop.steps": 7},
    }


def test_a_head_written_before_a_setting_was_there_is_kept(cache: Cache, tmp_path: Path) -> None:
    train(["natural"], cache, tmp_path / "heads", QUICK)
    description = tmp_path / "heads" / "natural" / "1" / "head.json"
    older = json.loads(description.read_text())
    for name in ("virtual", "virtual_scale", "virtual_every"):
        del older["info"]["settings"]["loop"][name]
    description.write_text(json.dumps(older))
    lines: list[str] = []
    train(["natural"], cache, tmp_path / "heads", QUICK, note=lines.append)
    assert len(lines) == 1 and "is there already" in lines[0]
    with pytest.raises(ExistsError):
        train(["natural"], cache, tmp_path / "heads", QUICK | {"virtual": 0.1})
