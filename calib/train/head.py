"""From a method's name and a cache to a saved head."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from calib import registry
from calib.artifact import DESCRIPTION, Artifact, HeadInfo, check_fits, check_free, load, save
from calib.cache import Cache
from calib.errors import CalibError, InputError, ProcessError, SettingError, UnsupportedError
from calib.files import lock
from calib.heads.base import FitRun
from calib.heads.cascade import fit_stages, stage_bases
from calib.heads.feed import Drive
from calib.heads.stack import activation_of
from calib.parallel.distributed import ALONE, World
from calib.progress import Progress, silent
from calib.settings import with_overrides

LOCK = "lock"


def train(
    method: str,
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    base: Artifact | Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Fit ``method`` on ``cache``, built on ``base`` where one is given, and write the head to ``out``.

    A learned method keeps checkpoints beside ``out`` while it trains; the same call goes on from them after an
    interruption and ends in the same head.

    Raises:
        UnknownNameError: no such method. SettingError: unknown or wrong setting. UnsupportedError: the cache lacks
            what the method needs, or the base does. InputError: the base is of another detector. ExistsError: ``out``
            exists, or another process trains for it. FitError: training left the finite numbers.
    """
    settings = settings_of(method, overrides or {}, seed)
    check_free(out, overwrite=overwrite)
    opened = cache if isinstance(cache, Cache) else Cache(cache)
    order = Order(method, settings, seed, opened, out, load(base) if isinstance(base, Path) else base)
    order.check()
    return order.train(device or torch.device("cpu"), progress, overwrite=overwrite)


def settings_of(method: str, overrides: Mapping[str, Any], seed: int) -> Any:
    """The dataclass of ``method`` with ``overrides``.

    Raises:
        UnknownNameError: no such method. SettingError: unknown or wrong setting or seed.
    """
    info = registry.method(method)
    if seed < 0:
        raise SettingError(f"seed is {seed}: expected at least 0")
    return with_overrides(registry.load(info.target)(), dict(overrides))


@dataclass(frozen=True)
class Order:
    """One head to be trained: the settings of ``method`` as its dataclass, the cache, the place, the base."""

    method: str
    settings: Any
    seed: int
    cache: Cache
    out: Path
    base: Artifact | None = None

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self.settings)))
        return plain

    def check(self) -> None:
        """Whether the cache has what the method needs, and the base.

        Raises:
            UnsupportedError: no. InputError: the base is of another detector, or the cache has no object.
        """
        check_needs(registry.method(self.method), self.cache, self.base)

    @property
    def chain(self) -> list[dict[str, Any]]:
        """The base and those below it, as the head will have them."""
        return [] if self.base is None else self.base.chain()

    def is_done(self) -> bool:
        """Whether the head at ``out`` is the one that ``train`` would write."""
        if not (self.out / DESCRIPTION).exists():
            return False
        info = load(self.out).info
        wanted = (self.method, self.plain, self.seed, self.cache.digest, self.chain)
        return (info.method, info.settings, info.seed, info.cache_digest, info.base) == wanted

    def train(
        self,
        device: torch.device,
        progress: Progress,
        *,
        overwrite: bool = False,
        drive: Drive | None = None,
        world: World = ALONE,
    ) -> Artifact:
        """Fit and save, as the first process of ``world``; raises as the function ``train``."""
        checkpoints = self.out.with_name(f".{self.out.name}.training")
        request = {"method": self.method, "settings": self.plain, "seed": self.seed, "cache": self.cache.digest}
        if world.size > 1:  # the sums of other numbers of processes have other last bits
            request["processes"] = world.size
        if self.base is not None:
            request["base"] = self.chain
        run = self._run(device, world, progress=progress, checkpoint=checkpoints / _digest(request), drive=drive)
        with lock(checkpoints / LOCK, f"training {self.out}"):
            try:
                head = fit_stages(self.settings, self.cache, run).to("cpu").eval().requires_grad_(False)
            except BaseException as e:
                # Or it was interrupted before its first checkpoint.
                if fails_again(e) or [p.name for p in checkpoints.iterdir()] == [LOCK]:
                    shutil.rmtree(checkpoints, ignore_errors=True)
                raise
            artifact = Artifact(head, self._info(run))
            save(self.out, artifact, overwrite=overwrite)
            shutil.rmtree(checkpoints, ignore_errors=True)
        return artifact

    def assist(self, device: torch.device, world: World) -> None:
        """What a process of ``world`` does that is not the first: it writes nothing."""
        self.settings.fit(self.cache, self._run(device, world))

    def _run(self, device: torch.device, world: World, **more: Any) -> FitRun:
        base = None if self.base is None else self.base.head
        return FitRun(self.seed, device, world=world, base=base, **more)

    def _info(self, run: FitRun) -> HeadInfo:
        return HeadInfo.of(self.cache, self.method, self.plain, self.seed, run.losses, run.world.size, self.base)


def fails_again(error: BaseException) -> bool:
    """Whether the same request would end in the same error."""
    return isinstance(error, CalibError) and not isinstance(error, ProcessError)


def _digest(request: dict[str, Any]) -> str:
    """Names the checkpoints of a request: two fits can share their loop and still differ in what they learn."""
    return xxhash.xxh3_64(json.dumps(request, sort_keys=True).encode()).hexdigest()


def check_needs(info: registry.MethodInfo, cache: Cache, base: Artifact | None = None) -> None:
    """Whether ``cache`` has what a method needs, and ``base`` is one for it.

    Raises:
        UnsupportedError: no. InputError: the base is of another detector.
    """
    activation, whose = cache.manifest.detector.activation, f"the one of cache {cache.path}"
    if base is not None:
        activation, whose = _checked_base(info, cache, base), f"the base, a head of {base.info.method},"
    if activation not in info.activations:
        raise UnsupportedError(
            f"{info.name} is defined for {' and '.join(info.activations)} detectors; {whose} gives {activation} scores"
        )
    if "labels" in info.needs and cache.manifest.mode != "train":
        raise UnsupportedError(
            f"{info.name} learns from labelled proposals; cache {cache.path} was extracted with --mode test",
            hint="extract the train split with --mode train",
        )
    if any(need.startswith("labels") and "=" not in need for need in info.needs):
        labels = cache.stages[0].labels
        if not bool(((labels >= 0) & (labels < cache.background)).any()):
            raise InputError(
                f"{info.name} learns from proposals of objects; of the {len(labels)} rows of cache {cache.path} none "
                "has a class",
                hint="are the boxes of the annotations in pixels of these images? do proposals reach them (IoU 0.5)?",
            )


def check_takes_base(info: registry.MethodInfo) -> None:
    """Raise UnsupportedError where a base would change nothing."""
    if info.base == "ignores":
        raise UnsupportedError(
            f"{info.name} takes no base: what it computes depends on nothing of the detector's classifier or another's",
            hint=f"methods that do: {', '.join(m.name for m in registry.METHODS.values() if m.base != 'ignores')}",
        )


def _checked_base(info: registry.MethodInfo, cache: Cache, base: Artifact) -> str:
    """What the scores of ``base`` are."""
    check_takes_base(info)
    check_fits(base, cache, Path(base.info.method))
    one = stage_bases(base.head, cache)[0]
    return activation_of(cache, FitRun(base=one))
