"""Where the files that ship with the product lie.

``data/`` at the top of a checkout is installed as ``calib/data/shipped``; both places are looked at, the
installed one first.
"""

from pathlib import Path

from calib.errors import MissingFileError

_HERE = Path(__file__).resolve().parent
_PLACES = (_HERE / "shipped", _HERE.parents[1] / "data")


def shipped(name: str) -> Path:
    """Path of the shipped file ``name``, for example ``"shapes_detector.safetensors"``.

    Raises:
        MissingFileError: neither an installed copy nor a checkout holds it.
    """
    for folder in _PLACES:
        if (folder / name).is_file():
            return folder / name
    raise MissingFileError(
        f"shipped file '{name}' not found in {' or '.join(str(p) for p in _PLACES)}",
        hint="the installation is incomplete: install calib again, or run inside a complete checkout",
    )
