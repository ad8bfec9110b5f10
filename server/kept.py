"""What the workers of one service have loaded, for a worker that starts later.

It must serve what the others serve, whatever has become of the model folder meanwhile: copies of loaded versions lie in
``NAME/VERSION/`` as in that folder, a version that is not loaded has its reason there. One worker at a time writes,
the one that has its turn at the journal.
"""

import shutil
from pathlib import Path

from calib.artifact import DESCRIPTION, TENSORS
from calib.files import replacing

from .errors import BusyError

REASON = ".not-loaded"
_ALL = "all"


class Kept:
    """The copies, below ``root``."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "models"

    @property
    def begun(self) -> bool:
        """Whether a worker has loaded everything before."""
        return (self.root / _ALL).exists()

    def begin(self) -> None:
        """Forget what a worker has left that did not come to the end."""
        shutil.rmtree(self.root, ignore_errors=True)

    def complete(self) -> None:
        """Everything was loaded."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / _ALL).touch()

    def stage(self, name: str, version: int, path: Path) -> Path:
        """Copy a version to where nobody sees it yet.

        Raises:
            BusyError: there is no space for it.
        """
        staged = self.root.with_name(f"{name}-{version}.staged")
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            for part in (path / DESCRIPTION, path / TENSORS):
                if part.is_file():
                    shutil.copy2(part, staged / part.name)  # with its time, by which changes are noticed
        except OSError as e:
            shutil.rmtree(staged, ignore_errors=True)
            raise BusyError(f"it cannot be kept for other workers: {e}", hint="is there space on the disk?") from e
        return staged

    def settle(self, staged: Path, name: str, version: int, reason: str) -> None:
        """Keep what was staged; where it could not be loaded, which ``reason`` says, what was loaded before goes on."""
        target = self.root / name / str(version)
        if reason and target.exists() and not (target / REASON).exists():
            shutil.rmtree(staged, ignore_errors=True)
            return
        if reason:
            (staged / REASON).write_text(reason)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)

    def drop(self, name: str, version: int, reason: str) -> None:
        """A version is not loaded any more."""
        with replacing(self.root / name / str(version) / REASON) as temporary:
            temporary.write_text(reason)
