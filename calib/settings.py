"""Settings of the stages as frozen dataclasses, filled from TOML and ``--set key=value``.

A value from the command line is text; it is read according to the field's type. Unknown keys and wrong types are
errors that name the key and the nearest known one.
"""

import math
import tomllib
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from calib.errors import FormatError, SettingError
from calib.files import require

T = TypeVar("T")


@dataclass(frozen=True)
class Loop:
    """The training loop: SGD with momentum and weight decay.

    ``schedule`` is ``steps`` (times 0.1 at each milestone, a share of ``steps``) or ``cosine`` (to zero).
    ``clip_norm`` 0 means no clipping. ``precision`` is that of the large matrix products, fp32 or bf16; weights and
    losses are float32 in both. ``virtual`` above 0 adds that weight times the loss of virtual features of rare classes
    (FASA, ``training/virtual.py``; there 0.1), about ``virtual_scale`` a chunk, adapted every ``virtual_every`` steps.
    """

    steps: int = 4500
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "steps"
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)
    warmup_steps: int = 500
    warmup_factor: float = 1e-3
    clip_norm: float = 0.0
    checkpoint_every: int = 1000
    precision: str = "fp32"
    virtual: float = 0.0
    virtual_scale: float = 1.0
    virtual_every: int = 500

    optimizer: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "checkpoint_every", "virtual_every")
        at_least(self, 0, "lr", "momentum", "weight_decay", "warmup_steps", "warmup_factor", "clip_norm", "virtual")
        at_least(self, 0, "virtual_scale")
        one_of(self, "schedule", ("steps", "cosine"))
        one_of(self, "precision", ("fp32", "bf16"))
        if self.momentum >= 1:
            raise SettingError(f"momentum is {self.momentum}: expected less than 1")
        if not all(0 < m <= 1 for m in self.milestones):
            raise SettingError(
                f"milestones are {', '.join(f'{m:g}' for m in self.milestones)}: expected shares of steps, in (0, 1]",
                hint="a milestone at step 8000 of 12000 is 0.667",
            )


@dataclass(frozen=True)
class AdamLoop(Loop):
    """The same with AdamW (Loshchilov and Hutter, ICLR 2019), whose decay is no part of the gradient: ``momentum`` is
    beta 1, beta 2 is 0.999."""

    optimizer: ClassVar[str] = "adamw"


@dataclass(frozen=True)
class ImageBatches:
    """A step sees ``chunks`` chunks of ``images_per_chunk`` whole images; its loss is the mean of the chunks' losses.

    The defaults are 8 devices with 2 images each, on which the published schedules were tuned. ``sampling`` is
    ``natural`` or ``repeat-factor`` with ``repeat_threshold`` t (``sampling/repeat_factor.py``).
    """

    chunks: int = 8
    images_per_chunk: int = 2
    sampling: str = "natural"
    repeat_threshold: float = 1e-3

    def __post_init__(self) -> None:
        at_least(self, 1, "chunks", "images_per_chunk")
        at_least(self, 0, "repeat_threshold")
        one_of(self, "sampling", ("natural", "repeat-factor"))


@dataclass(frozen=True)
class Nms:
    """From scores to detections: keep scores above the threshold, class-wise NMS, the best per image."""

    score_threshold: float = 1e-4
    nms_iou: float = 0.5
    max_detections: int = 300

    def __post_init__(self) -> None:
        at_least(self, 0, "score_threshold", "nms_iou")
        at_least(self, 1, "max_detections")
        if self.nms_iou > 1 or self.score_threshold > 1:
            raise SettingError("nms_iou and score_threshold lie in [0, 1]")


def at_least(settings: Any, low: float, *names: str) -> None:
    """Raise SettingError for the first of ``names`` whose value is below ``low`` or not a number."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not low <= value < math.inf:
            raise SettingError(f"{name} is {value}: expected at least {low:g}")


def one_of(settings: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise SettingError unless the value of ``name`` is one of ``allowed``."""
    value = getattr(settings, name)
    if value not in allowed:
        raise SettingError(f"{name} is '{value}': expected one of {', '.join(allowed)}")


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of settings.

    Raises:
        MissingFileError: not there. FormatError: not TOML.
    """
    try:
        return tomllib.loads(require(path, "settings file").read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise FormatError(f"settings file {path} is not valid TOML: {e}") from e


def read_toml(path: Path) -> dict[str, Any]:
    """``load_toml`` with tables as dotted keys."""
    return _flatten(load_toml(path))


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def parse_assignments(assignments: list[str]) -> dict[str, str]:
    """``["beta=8", "loop.lr=0.1"]`` -> dict.

    Raises:
        SettingError: an entry without ``=``.
    """
    pairs = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator:
            raise SettingError(f"'{text}' is no setting: expected key=value, for example --set lr=0.01")
        pairs[key.strip().replace("-", "_")] = value.strip()
    return pairs


def with_overrides(settings: T, overrides: dict[str, Any]) -> T:
    """A copy of a (nested) frozen dataclass with dotted keys replaced.

    A key of a nested table may be written without its table: ``lr`` for ``loop.lr``.

    Raises:
        SettingError: unknown key or wrong type.
    """
    for key, value in overrides.items():
        settings = _set(settings, _full_key(settings, key), value)
    return settings


def known_keys(settings: Any, prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a (nested) dataclass with their values."""
    keys: dict[str, Any] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        keys |= known_keys(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return keys


def has_key(settings: Any, key: str) -> bool:
    """Whether ``with_overrides`` would find ``key``."""
    try:
        _full_key(settings, key)
    except SettingError:
        return False
    return True


def _full_key(settings: Any, key: str) -> str:
    known = known_keys(settings)
    if key in known:
        return key
    if f"loop.{key}" in known:
        return f"loop.{key}"
    inner = [k for k in known if k.endswith("." + key)]
    if len(inner) == 1:
        return inner[0]
    short = {k.rpartition(".")[2]: k for k in known}
    near = get_close_matches(key, [*known, *short], n=1)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    raise SettingError(f"unknown setting '{key}'.{guess}", hint=f"known: {', '.join(known) or 'none'}")


def _set(settings: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    if rest:
        return replace(settings, **{head: _set(getattr(settings, head), rest, value)})
    kind = get_type_hints(type(settings))[head]
    return replace(settings, **{head: _convert(key, kind, value)})


def _convert(key: str, kind: Any, value: Any) -> Any:
    """``value`` as a field of type ``kind``: text, as a command line has it, is read; other values are taken as is."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # here, as ``calib --help`` has no use for it

    is_text, given = isinstance(value, str), value.item() if hasattr(value, "item") else value  # numpy's numbers, too
    if value == "none" and type(None) in get_args(kind):
        return None
    if get_origin(kind) is tuple and isinstance(value, str | list):
        given = tuple(part for part in value.split(",") if part) if isinstance(value, str) else tuple(value)
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(given, strict=not is_text)
    except ValidationError:
        name = str(kind) if get_args(kind) else kind.__name__
        raise SettingError(f"setting '{key}' is '{value}': expected {name}", hint=f"--set {key}=VALUE") from None


def parse_bytes(text: str) -> int:
    """``268435456``, ``256MB`` or ``256MiB`` -> bytes.

    Raises:
        SettingError: not a size.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SettingError(f"'{text}' is no size in bytes", hint="for example 256MB, 1GiB or 268435456") from None
