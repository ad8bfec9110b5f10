"""From methods and a cache to saved heads: one head or several in one pass, by this process or by several.

``train`` is the one entrance. Several processes that train one head share the rows of every step; where there are
several heads, each process trains some of them. Under torchrun this process is one of those.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch

from calib import registry
from calib.artifact import Artifact, check_free, load
from calib.cache import Cache
from calib.errors import CalibError, SettingError, UnsupportedError
from calib.layout import BASE, FIRST
from calib.parallel.devices import choose_device, device_of_rank
from calib.parallel.distributed import ALONE, World, joined, launch, rank, ranks
from calib.progress import Progress, silent
from calib.settings import parse_assignments
from calib.storage import local
from calib.training.context import FitContext
from calib.training.loop import run_trainings
from calib.training.plan import HeadPlan, check_needs, check_takes_base, fails_again, overrides_of, settings_of
from calib.training.preload import preload as preload_features

Note = Callable[[str], None]
Base = Artifact | Path | str


def _silent_note(line: str) -> None:
    pass


@overload
def train(
    methods: str,
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Base | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    processes: int = 1,
    preload: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    note: Note = _silent_note,
) -> Artifact: ...


@overload
def train(
    methods: list[str] | tuple[str, ...],
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Base | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    processes: int = 1,
    preload: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    note: Note = _silent_note,
) -> dict[str, Artifact]: ...


def train(
    methods: str | list[str] | tuple[str, ...],
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Base | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    processes: int = 1,
    preload: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    note: Note = _silent_note,
) -> Artifact | dict[str, Artifact]:
    """Fit one method and write its head to ``out``, or several and write theirs to ``out/METHOD/1``.

    Of several methods, those whose batches agree (sampler, its settings, seed) learn from one reading of each batch;
    heads that are there already as they would be written are kept. Every head is the one that it is alone, to the bit.
    After an interruption the same call goes on from the last checkpoints and ends in the same heads.

    Args:
        overrides: settings by key. With several methods a key goes to all that have it, METHOD.KEY to one.
        base: a fitted head that the others are built on, its folder, or ``METHOD[:key=value...]``, which is fitted
            first.
        device: of the heads; also ``auto``.
        processes: new processes that share the work. The head of one method is then that of one process up to the
            order in which numbers are added.
        preload: keep the features in the memory of ``device``.
        note: called with a line for each pass and each head that is kept.

    Returns:
        The head; of several methods, each by its method. Under torchrun every process has the head, the first one
        writes it.

    Raises:
        UnknownNameError: no such method. SettingError: unknown or wrong setting. UnsupportedError: the cache lacks
            what a method needs, or the base does. InputError: the base is of another detector. ExistsError: something
            stands in the place of a head, or another process trains for it. FitError: training left the finite
            numbers. NonFiniteError: features are not finite. ProcessError: a process is gone. Of several methods the
            first error is raised when the heads of the others are written.
    """
    several, names = not isinstance(methods, str), [methods] if isinstance(methods, str) else list(methods)
    request = _Request(names, several, cache, out, overrides or {}, None, seed, str(device), preload, overwrite,
                       progress, note)  # fmt: skip
    request.check(processes, has_base=base is not None)
    if base is None or isinstance(base, Artifact):
        heads = _run(replace(request, base=base), processes)
    else:
        how = {"seed": seed, "device": device, "processes": processes, "preload": preload, "progress": progress}
        with fitted_base(base, names, cache, out, **how) as folder:
            heads = _run(replace(request, base=load(folder)), processes)
    return heads if several else heads[names[0]]


@contextmanager
def fitted_base(base: Path | str, methods: Sequence[str], cache: Path | Cache, out: Path, **how: Any) -> Iterator[Path]:
    """The folder of ``base``, a head or ``METHOD[:key=value...]``, for ``methods`` that are trained for ``out``.

    One that is not fitted yet is fitted by ``train(..., **how)`` and kept beside ``out`` until the end of the context,
    so that an interrupted training goes on with it.

    Raises:
        As ``train`` and ``calib.storage.local``. UnsupportedError: one of ``methods`` takes no base.
    """
    for method in methods:
        check_takes_base(registry.method(method))
    named = _method_of(base)
    if named is None:
        yield local(base)
        return
    if ranks() > 1:
        raise SettingError(f"base {base} is not fitted yet", hint="under torchrun a base is a folder: train it first")
    (name, overrides), opened, seed = named, _opened(cache), int(how.get("seed", 0))
    place = out.with_name(BASE.format(out.name))
    folder = place / FIRST
    check_needs(registry.method(name), opened)
    try:
        if not HeadPlan(name, settings_of(name, overrides, seed), seed, opened, folder).is_done():
            train(name, opened, folder, overrides, overwrite=True, **how)
        yield folder
    except BaseException as e:
        if fails_again(e):
            shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _method_of(base: str | Path) -> tuple[str, dict[str, str]] | None:
    """Method and settings of ``METHOD[:key=value...]``; None of a folder or a URL.

    Raises:
        UnknownNameError: no such method. SettingError: what follows it is no setting.
    """
    name, *settings = str(base).split(":")
    names_method = name in registry.METHODS or (bool(settings) and "/" not in str(base) and not Path(base).exists())
    if isinstance(base, Path) or not names_method:
        return None
    return registry.method(name).name, parse_assignments(settings)


@dataclass(frozen=True)
class _Request:
    """What ``train`` was asked for; with a path as ``cache`` it can be sent to other processes."""

    methods: list[str]
    several: bool
    cache: Path | Cache
    out: Path
    overrides: Mapping[str, Any]
    base: Artifact | None
    seed: int
    device: str
    preload: bool
    overwrite: bool
    progress: Progress
    note: Note

    def check(self, processes: int, *, has_base: bool) -> None:
        """What can be known before anything is opened or fitted; raises as ``train``."""
        _check_processes(processes)
        if ranks() > 1 and (processes > 1 or self.several):
            raise SettingError(
                "torchrun has started the processes already",
                hint="calib train ... --one-pass --processes N" if self.several else "leave --processes out",
            )
        if repeated := {m for m in self.methods if self.methods.count(m) > 1}:
            raise SettingError(f"method {min(repeated)} is named twice", hint="train its variants one by one")
        self.settings()
        if has_base and not self.several:
            check_free(self.out, overwrite=self.overwrite)

    def settings(self) -> dict[str, Any]:
        """The settings of every method."""
        own = overrides_of(self.methods, self.overrides) if self.several else {self.methods[0]: self.overrides}
        return {m: settings_of(m, own[m], self.seed) for m in self.methods}

    def plans(self) -> dict[str, HeadPlan]:
        """The head of every method, checked."""
        opened = _opened(self.cache)
        places = {m: self.out / m / FIRST if self.several else self.out for m in self.methods}
        plans = {m: HeadPlan(m, s, self.seed, opened, places[m], self.base) for m, s in self.settings().items()}
        for plan in plans.values():
            plan.check()
        return plans

    def left(self, plans: Mapping[str, HeadPlan]) -> list[str]:
        """The methods whose heads are still to be trained.

        Raises:
            ExistsError: something else stands in the place of one.
        """
        left = [m for m, plan in plans.items() if self.overwrite or not (self.several and plan.is_done())]
        for m in left:
            check_free(plans[m].out, overwrite=self.overwrite)
        return left

    def train(self, device: torch.device, world: World = ALONE) -> dict[str, Artifact | Exception]:
        """Train in this process; each head, or what ended it."""
        plans = self.plans()
        left = self.left(plans) if world.rank == 0 else self.methods
        heads: dict[str, Artifact | Exception] = {m: load(plans[m].out) for m in self.methods if m not in left}
        for m in heads:
            self.note(f"{m}: {plans[m].out} is there already")
        if self.preload and left:
            preload_features(plans[left[0]].cache, device, progress=self.progress)
        contexts = [FitContext(device=device, progress=self.progress, world=world) for _ in left]
        fits = [plans[m].trainings(c, overwrite=self.overwrite) for m, c in zip(left, contexts, strict=True)]
        heads |= zip(left, run_trainings(fits, self._note_pass if len(left) > 1 else lambda labels: None), strict=True)
        return {m: heads[m] for m in self.methods}

    def _note_pass(self, labels: list[str]) -> None:
        if len(labels) > 1:
            self.note(f"one pass for {len(labels)} heads: {', '.join(labels)}")
        else:
            self.note(f"{labels[0]}: no other head takes its batches; trained in a pass of its own")


def _run(request: _Request, processes: int) -> dict[str, Artifact]:
    learned = [m for m in request.methods if registry.method(m).trains]
    if ranks() > 1:
        return _raised(request, _as_rank(request))
    if processes == 1 or not (learned or request.several):
        return _raised(request, request.train(choose_device(request.device)))
    plans = request.plans()
    left = request.left(plans)
    sent = replace(request, cache=_opened(request.cache).path)
    if not request.several:
        _check_shared(plans[request.methods[0]])
        launch(processes, _as_rank, sent)
    elif left:
        shares = [left[k::processes] for k in range(min(processes, len(left)))]
        for failed in launch(len(shares), _as_share, sent, shares):
            if failed is not None:
                raise failed
    return {m: load(plan.out) for m, plan in plans.items()}


def _raised(request: _Request, heads: Mapping[str, Artifact | Exception]) -> dict[str, Artifact]:
    """The heads, where all are there; else the first error."""
    failed = {m: e for m, e in heads.items() if isinstance(e, Exception)}
    for m, error in failed.items():
        if request.several:
            request.note(f"{m} failed: {error}")
    for error in failed.values():
        raise error
    return {m: a for m, a in heads.items() if isinstance(a, Artifact)}


def _as_rank(request: _Request) -> dict[str, Artifact | Exception]:
    """One head by all ranks; the first writes it."""
    if not registry.method(request.methods[0]).trains:
        return request.train(choose_device(request.device), World(rank(), ranks()))
    device = device_of_rank(request.device, int(os.environ["LOCAL_RANK"]))
    _check_shared(request.plans()[request.methods[0]])
    with joined(device) as world:
        own = request if world.rank == 0 else replace(request, progress=silent)
        heads = own.train(device, world)
        _raised(own, heads)
    return heads


def _as_share(request: _Request, shares: list[list[str]]) -> Exception | None:
    """The heads of this rank; an error is returned, since raised it would end the other ranks."""
    k = rank()
    methods = shares[k]
    own = overrides_of(request.methods, request.overrides)
    overrides = {f"{m}.{key}": value for m in methods for key, value in own[m].items()}
    shown = request.progress if k == 0 else silent  # two bars in one place would be none
    share = replace(request, methods=methods, overrides=overrides, progress=shown)
    try:
        _raised(share, share.train(device_of_rank(request.device, k)))
    except CalibError as e:
        return e
    return None


def _opened(cache: Path | Cache) -> Cache:
    return cache if isinstance(cache, Cache) else Cache(cache)


def _check_processes(processes: int) -> None:
    if processes < 1:
        raise SettingError(f"processes is {processes}: expected at least 1")
    cores = os.cpu_count() or 1
    if processes > 4 * cores:
        raise SettingError(
            f"processes is {processes}, and this machine has {cores} cores", hint="one per core, or per GPU"
        )


def _check_shared(plan: HeadPlan) -> None:
    """Raise UnsupportedError where several processes cannot share the rows of a step."""
    if len(plan.cache.stages) > 1:
        raise UnsupportedError(
            f"cache {plan.cache.path} is of a cascade, whose stages are not divided among processes",
            hint="train it with one process",
        )
