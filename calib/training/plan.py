"""One head to be trained: what is asked for, whether the cache and the base allow it, and the steps from there to the
saved head.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from calib import registry
from calib.artifact import Artifact, HeadInfo, check_fits, load, save
from calib.cache import Cache
from calib.errors import CalibError, InputError, ProcessError, SettingError, UnsupportedError
from calib.files import lock
from calib.layout import DESCRIPTION, LOCK, TRAINING
from calib.settings import has_key, with_overrides
from calib.training.bases import activation_of
from calib.training.context import FitContext
from calib.training.loop import Method, Trainings
from calib.training.stages import fit_stages, stage_bases


@dataclass(frozen=True)
class HeadPlan:
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

    @property
    def chain(self) -> list[dict[str, Any]]:
        """The base and those below it, as the head will have them."""
        return [] if self.base is None else self.base.chain()

    def check(self) -> None:
        """Whether the cache has what the method needs, and the base.

        Raises:
            UnsupportedError: no. InputError: the base is of another detector, or the cache has no object.
        """
        check_needs(registry.method(self.method), self.cache, self.base)

    def is_done(self) -> bool:
        """Whether the head at ``out`` is the one that would be written."""
        if not (self.out / DESCRIPTION).exists():
            return False
        info = load(self.out).info
        wanted = (self.method, self.plain, self.seed, self.cache.digest, self.chain)
        if info.method != self.method:
            return False
        # A head that was written before a setting was there has its default.
        own = _over(replace(self, settings=_defaults(self.method)).plain, info.settings)
        return (info.method, own, info.seed, info.cache_digest, info.base) == wanted

    def trainings(self, context: FitContext, *, overwrite: bool = False) -> Trainings[Artifact]:
        """Fit and save; of several processes the first alone writes.

        An interruption leaves checkpoints beside ``out``, from which the same plan goes on.

        Raises:
            As the method's ``fit``. ExistsError: ``out`` exists, or another process trains for it.
        """
        own = replace(context, seed=self.seed, base=None if self.base is None else self.base.head)
        if context.world.rank:
            return self._artifact((yield from fit_stages(self.settings, self.cache, own)), own)
        checkpoints = self.out.with_name(TRAINING.format(self.out.name))
        own = replace(own, checkpoint=checkpoints / self._digest(context))
        with lock(checkpoints / LOCK, f"training {self.out}"):
            try:
                artifact = self._artifact((yield from fit_stages(self.settings, self.cache, own)), own)
            except BaseException as e:
                # Or it was interrupted before its first checkpoint.
                if fails_again(e) or [p.name for p in checkpoints.iterdir()] == [LOCK]:
                    shutil.rmtree(checkpoints, ignore_errors=True)
                raise
            save(self.out, artifact, overwrite=overwrite)
            shutil.rmtree(checkpoints, ignore_errors=True)
        return artifact

    def _artifact(self, head: Any, context: FitContext) -> Artifact:
        head = head.to("cpu").eval().requires_grad_(False)
        processes = context.world.size
        info = HeadInfo.of(self.cache, self.method, self.plain, self.seed, context.losses, processes, self.base)
        return Artifact(head, info)

    def _digest(self, context: FitContext) -> str:
        """Names the checkpoints of a request: two fits can share their loop and still differ in what they learn."""
        request: dict[str, Any] = {"method": self.method, "settings": self.plain, "seed": self.seed}
        request["cache"] = self.cache.digest
        if context.world.size > 1:  # the sums of other numbers of processes have other last bits
            request["processes"] = context.world.size
        if self.base is not None:
            request["base"] = self.chain
        return xxhash.xxh3_64(json.dumps(request, sort_keys=True).encode()).hexdigest()


def settings_of(method: str, overrides: Mapping[str, Any], seed: int) -> Any:
    """The dataclass of ``method`` with ``overrides``.

    Raises:
        UnknownNameError: no such method. SettingError: unknown or wrong setting or seed.
    """
    if seed < 0:
        raise SettingError(f"seed is {seed}: expected at least 0")
    return with_overrides(_defaults(method), dict(overrides))


def _defaults(method: str) -> Method:
    defaults: Method = registry.load(registry.method(method).target)()
    return defaults


def _over(defaults: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Nested ``settings``, and ``defaults`` where they lack one."""
    below = {k: _over(v, settings[k]) for k, v in defaults.items() if isinstance(v, dict) and k in settings}
    return defaults | settings | below


def overrides_of(methods: list[str], overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The overrides of every method: those for all that have the setting, then those for it alone (METHOD.KEY).

    Raises:
        UnknownNameError: no such method. SettingError: a key for a method that is not trained, or that none has.
    """
    blank = {m: _defaults(m) for m in methods}
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


def fails_again(error: BaseException) -> bool:
    """Whether the same request would end in the same error."""
    return isinstance(error, CalibError) and not isinstance(error, ProcessError)


def check_needs(info: registry.MethodInfo, cache: Cache, base: Artifact | None = None) -> None:
    """Whether ``cache`` has what a method needs, and ``base`` is one for it.

    Raises:
        UnsupportedError: no. InputError: the base is of another detector, or the cache has no object.
    """
    activation, whose = cache.manifest.detector.activation, f"the one of cache {cache.path}"
    if base is not None:
        activation, whose = _checked_base(info, cache, base), f"the base, a head of {base.info.method},"
    if activation not in info.activations:
        raise UnsupportedError(
            f"{info.name} is defined for {' and '.join(info.activations)} detectors; {whose} gives {activation} scores"
        )
    if info.labels == "train" and cache.manifest.mode != "train":
        raise UnsupportedError(
            f"{info.name} learns from labelled proposals; cache {cache.path} was extracted with --mode test",
            hint="extract the train split with --mode train",
        )
    if info.labels != "none":
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
    return activation_of(cache, FitContext(base=one))
