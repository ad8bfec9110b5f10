"""The head that others are built on: a head folder, or ``METHOD[:key=value...]``, fitted first."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calib import registry
from calib.artifact import Artifact
from calib.cache import Cache
from calib.settings import parse_assignments
from calib.storage import local
from calib.train.head import Order, check_needs, check_takes_base, fails_again, settings_of

Fit = Callable[[str, Mapping[str, Any], Path], Artifact | None]


def method_of(base: str | Path) -> tuple[str, dict[str, str]] | None:
    """Method and settings of ``METHOD[:key=value...]``; None of a folder or a URL.

    Raises:
        UnknownNameError: no such method. SettingError: what follows it is no setting.
    """
    name, *settings = str(base).split(":")
    names_method = name in registry.METHODS or (bool(settings) and "/" not in str(base) and not Path(base).exists())
    if isinstance(base, Path) or not names_method:
        return None
    return registry.method(name).name, parse_assignments(settings)


@contextmanager
def opened_base(
    base: str | Path | None, methods: Sequence[str], cache: Cache, out: Path, seed: int, fit: Fit
) -> Iterator[Path | None]:
    """The folder of ``base``, for ``methods`` that are trained on ``cache`` for ``out``.

    One that is not fitted yet is fitted by ``fit(method, settings, folder)`` and kept beside ``out`` until the end
    of the context, so that an interrupted training goes on with it.

    Raises:
        As ``fit`` and ``calib.storage.local``. UnsupportedError: one of ``methods`` takes no base.
    """
    if base is None:
        yield None
        return
    for method in methods:
        check_takes_base(registry.method(method))
    asked = method_of(base)
    if asked is None:
        yield local(base)
        return
    name, overrides = asked
    place = out.with_name(f".{out.name}.base")
    folder = place / "1"
    check_needs(registry.method(name), cache)
    try:
        if not Order(name, settings_of(name, overrides, seed), seed, cache, folder).is_done():
            fit(name, overrides, folder)
        yield folder
    except BaseException as e:
        if fails_again(e):
            shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
