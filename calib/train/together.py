"""Training by several processes: one head by all of them, or several heads dealt to them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calib import registry
from calib.artifact import Artifact, check_free, load
from calib.cache import Cache
from calib.errors import CalibError, SettingError, UnsupportedError
from calib.heads.held import hold as hold_features
from calib.parallel.devices import choose_device, device_of_rank
from calib.parallel.distributed import joined, launch, ranks
from calib.progress import Progress, silent
from calib.train.head import Order, settings_of, train
from calib.train.one_pass import VERSION, divide, orders_of, to_do, train_in_one_pass


@dataclass(frozen=True)
class Request:
    """What ``calib.train.train`` is given, in a form that other processes can be sent; ``device`` as ``--device``."""

    method: str
    cache: Path
    out: Path
    overrides: Mapping[str, Any]
    seed: int = 0
    device: str = "cpu"
    overwrite: bool = False
    progress: Progress = silent
    hold: bool = False  # the features in the device's memory
    base: Path | None = None

    def order(self) -> Order:
        """The head to be trained.

        Raises:
            As ``train``. UnsupportedError: the loss of the method cannot be divided among processes.
        """
        settings, info = settings_of(self.method, self.overrides, self.seed), registry.method(self.method)
        if info.learns and not info.divides:
            raise UnsupportedError(
                f"the loss of {self.method} is not divided among processes: each would take the means of its own rows",
                hint="train it with one process; a method says `divides` in calib/registry.py when its loss takes "
                "every mean by Batch.chunk_mean or Batch.row_mean",
            )
        base = None if self.base is None else load(self.base)
        order = Order(self.method, settings, self.seed, Cache(self.cache), self.out, base)
        order.check()
        if len(order.cache.stages) > 1:
            raise UnsupportedError(
                f"cache {self.cache} is of a cascade, whose stages are not divided among processes",
                hint="train it with one process",
            )
        return order

    def alone(self) -> Artifact:
        """Trained in this process."""
        device = choose_device(self.device)
        return train(
            self.method,
            _opened(self.cache, device, self.hold, self.progress),
            self.out,
            self.overrides,
            base=self.base,
            seed=self.seed,
            device=device,
            overwrite=self.overwrite,
            progress=self.progress,
        )


def train_together(processes: int, request: Request) -> Artifact:
    """``calib.train.train`` by ``processes`` new processes, which share the rows of every step.

    The head is that of one process up to the order in which numbers are added. After an interruption, or when a
    process was killed, the same call goes on from the last checkpoint and ends in the same bits. A method that learns
    nothing is fitted in this process.

    Raises:
        As ``train`` and ``Request.order``. ProcessError: a process is gone.
    """
    _check(processes)
    if processes == 1 or not registry.method(request.method).learns:
        return request.alone()
    request.order()
    check_free(request.out, overwrite=request.overwrite)
    launch(processes, _rank, request)
    return load(request.out)


def train_as_rank(request: Request) -> Artifact | None:
    """The part of this process where torchrun started several; only rank 0 writes anything and has the head.

    Raises:
        As ``train_together``.
    """
    if not registry.method(request.method).learns:
        return request.alone() if os.environ["RANK"] == "0" else None
    order = request.order()
    device = device_of_rank(request.device, int(os.environ["LOCAL_RANK"]))
    with joined(device) as world:
        if request.hold:
            hold_features(order.cache, device, progress=request.progress if world.rank == 0 else silent)
        if world.rank == 0:
            check_free(request.out, overwrite=request.overwrite)
            return order.train(device, request.progress, overwrite=request.overwrite, world=world)
        order.assist(device, world)
    return None


def _opened(path: Path, device: torch.device, hold: bool, progress: Progress) -> Cache:
    cache = Cache(path)
    if hold:
        hold_features(cache, device, progress=progress)
    return cache


def _check(processes: int) -> None:
    if processes < 1:
        raise SettingError(f"nproc is {processes}: expected at least 1")
    cores = os.cpu_count() or 1
    if processes > 4 * cores:
        raise SettingError(f"nproc is {processes}, and this machine has {cores} cores", hint="one per core, or per GPU")


def _rank(request: Request) -> None:
    train_as_rank(request)


def _say_nothing(line: str) -> None:
    pass


def deal(
    processes: int,
    methods: Sequence[str],
    cache: Path,
    out: Path,
    overrides: Mapping[str, Any],
    *,
    base: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
    hold: bool = False,
    note: Callable[[str], None] = _say_nothing,
) -> dict[str, Artifact]:
    """``train_in_one_pass`` with ``methods`` dealt to ``processes``: each trains its heads alone, the same bits.

    Raises:
        As ``train_in_one_pass``. ProcessError: a process is gone.
    """
    if ranks() > 1:
        raise SettingError("torchrun has started the processes already", hint="calib train ... --one-pass --nproc N")
    _check(processes)
    if processes == 1:
        where = choose_device(device)
        how: dict[str, Any] = {"base": base, "seed": seed, "device": where, "overwrite": overwrite}
        how["progress"] = progress
        return train_in_one_pass(methods, _opened(cache, where, hold, progress), out, overrides, **how, note=note)
    left = to_do(orders_of(methods, cache, out, overrides, seed, base), overwrite=overwrite)
    own = divide(methods, overrides)
    hands = [
        (tuple(left[k::processes]), {f"{m}.{key}": v for m in left[k::processes] for key, v in own[m].items()})
        for k in range(min(processes, len(left)))
    ]
    for failed in (
        launch(len(hands), _hand, hands, cache, out, base, seed, device, overwrite, progress, hold, note)
        if hands
        else ()
    ):
        if failed is not None:
            raise failed
    return {m: load(out / m / VERSION) for m in methods}


def _hand(
    hands: list[tuple[tuple[str, ...], dict[str, Any]]],
    cache: Path,
    out: Path,
    base: Path | None,
    seed: int,
    device: str,
    overwrite: bool,
    progress: Progress,
    hold: bool,
    note: Callable[[str], None],
) -> CalibError | None:
    """Train the heads of this process; an error is returned, since raised it would end the others."""
    rank = int(os.environ["RANK"])
    methods, overrides = hands[rank]
    where = device_of_rank(device, rank)
    shown = progress if rank == 0 else silent  # two bars in one place would be none
    try:
        train_in_one_pass(
            methods,
            _opened(cache, where, hold, shown),
            out,
            overrides,
            base=base,
            seed=seed,
            device=where,
            overwrite=overwrite,
            progress=shown,
            note=note,
        )
    except CalibError as e:
        return e
    return None
