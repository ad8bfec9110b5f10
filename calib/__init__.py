"""calib: post-hoc classifier calibration for long-tailed object detectors."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a bare checkout cli/ and server/ lie beside this package, not in it: `python -m calib.cli` must find them.
if (_Path(__file__).parent.parent / "pyproject.toml").is_file():
    __path__.append(str(_Path(__file__).parent.parent))
