"""calib: post-hoc classifier calibration for long-tailed object detectors."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

__version__ = "0.1.0"

# In a bare checkout cli/ and server/ lie beside this package, not in it: `python -m calib.cli` must find them.
if (_Path(__file__).parent.parent / "pyproject.toml").is_file():
    __path__.append(str(_Path(__file__).parent.parent))

_NAMES = ("open_cache", "load_head", "fit_head", "judge_head", "tune_heads", "compare_heads", "calibrate_head",
          "select_heads", "threshold_head")  # fmt: skip


def __getattr__(name: str) -> _Any:
    """The steps of ``calib.notebook``, loaded when the first of them is used."""
    if name in _NAMES:
        return getattr(_import_module("calib.notebook"), name)
    raise AttributeError(f"module 'calib' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
