"""Several methods trained from one reading of the cache: every head is the one that ``train`` would write alone."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calib import registry
from calib.artifact import Artifact, check_free, load
from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.feed import Learner, Source
from calib.heads.passes import Passes
from calib.progress import Progress, silent
from calib.settings import has_key
from calib.train.head import Order, settings_of

VERSION = "1"


def train_in_one_pass(
    methods: Sequence[str],
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Artifact | Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Artifact]:
    """Fit all ``methods``, built on ``base`` where one is given, and write their heads to ``out/METHOD/1``; by method.

    Learned heads whose batches agree (sampler, its settings, seed) learn from one reading of each batch; ``note`` is
    told which pass feeds which heads. An override whose key starts with a method's name and a dot is for that method,
    any other for every method that has the setting. After an interruption the same call goes on: heads that are there
    as they would be written are kept.

    Raises:
        As ``calib.train.train``, before anything is trained where that can be known. FitError, NonFiniteError: the
        first of the methods that failed; the heads of the others are written.
    """
    orders = orders_of(methods, cache, out, overrides or {}, seed, base)
    left = to_do(orders, overwrite=overwrite)
    artifacts = {m: load(orders[m].out) for m in methods if m not in left}
    for m in artifacts:
        note(f"{m}: {orders[m].out} is there already")
    where = device or torch.device("cpu")
    fitted = fit_orders(
        [orders[m] for m in left], where, progress=progress, note=partial(_tell, note, len(left)), overwrite=overwrite
    )
    failed = {m: e for m, e in zip(left, fitted, strict=True) if isinstance(e, BaseException)}
    for m, error in failed.items():
        note(f"{m} failed: {error}")
    for error in failed.values():
        raise error
    artifacts |= {m: a for m, a in zip(left, fitted, strict=True) if isinstance(a, Artifact)}
    return {m: artifacts[m] for m in methods}


def orders_of(
    methods: Sequence[str],
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any],
    seed: int,
    base: Artifact | Path | None = None,
) -> dict[str, Order]:
    """What ``train_in_one_pass`` is asked for; raises as it does, before anything is trained."""
    if repeated := {m for m in methods if list(methods).count(m) > 1}:
        raise SettingError(f"method {min(repeated)} is named twice", hint="train its variants one by one")
    divided = divide(methods, overrides)
    settings = {m: settings_of(m, divided[m], seed) for m in methods}
    opened = cache if isinstance(cache, Cache) else Cache(cache)
    below = load(base) if isinstance(base, Path) else base
    orders = {m: Order(m, settings[m], seed, opened, out / m / VERSION, below) for m in methods}
    for order in orders.values():
        order.check()
    return orders


def to_do(orders: Mapping[str, Order], *, overwrite: bool) -> list[str]:
    """The methods whose heads are not there yet.

    Raises:
        ExistsError: something else stands in the place of one.
    """
    left = [m for m, order in orders.items() if overwrite or not order.is_done()]
    for m in left:
        check_free(orders[m].out, overwrite=overwrite)
    return left


def fit_orders(
    orders: Sequence[Order],
    device: torch.device,
    *,
    progress: Progress = silent,
    note: Callable[[list[str]], None] = lambda names: None,
    overwrite: bool = False,
    watch: Callable[[int, Learner], Learner] = lambda k, learner: learner,
) -> list[Artifact | BaseException]:
    """Train and save ``orders`` of one cache together; the head of each, or what ended it.

    ``note`` is told of every pass: the names of its trainings. ``watch`` may put something around the training of
    order k.
    """
    passes = Passes(device, progress, note)
    artifacts: dict[int, Artifact] = {}

    def fit(k: int) -> None:
        def drive(learner: Learner, source: Source) -> None:
            passes.join(watch(k, learner), source)

        artifacts[k] = orders[k].train(device, silent, overwrite=overwrite, drive=drive)

    errors = passes.run([partial(fit, k) for k in range(len(orders))])
    return [artifacts[k] if e is None else e for k, e in enumerate(errors)]


def _tell(note: Callable[[str], None], heads: int, names: list[str]) -> None:
    if len(names) > 1:
        note(f"one pass for {len(names)} heads: {', '.join(names)}")
    elif heads > 1:
        note(f"{names[0]}: no other head takes its batches; trained in a pass of its own")


def divide(methods: Sequence[str], overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The overrides of every method, those for it alone last.

    Raises:
        UnknownNameError: no such method. SettingError: a key for a method that is not trained, or that none has.
    """
    blank = {m: registry.load(registry.method(m).target)() for m in methods}
    known = {m.replace("-", "_"): m for m in registry.METHODS}
    shared: dict[str, dict[str, Any]] = {m: {} for m in methods}
    own: dict[str, dict[str, Any]] = {m: {} for m in methods}
    for key, value in overrides.items():
        first, _, rest = key.partition(".")
        named = known.get(first.replace("-", "_")) if rest else None
        if named is not None and named not in own:
            raise SettingError(f"setting '{key}' is for {named}, which is not trained", hint=f"add {named}, or drop it")
        if named is not None:
            own[named][rest] = value
            continue
        having = [m for m in methods if has_key(blank[m], key)]
        if not having:
            raise SettingError(f"no method of {', '.join(methods)} has a setting '{key}'", hint="calib methods METHOD")
        for m in having:
            shared[m][key] = value
    return {m: shared[m] | own[m] for m in methods}
