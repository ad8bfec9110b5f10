"""Everything that one server process holds, made from its settings."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compute import Compute
from .engine import Engine
from .folders import left_out
from .held import Held
from .memory import keep_freed_memory
from .models import Model, Repository
from .serve_settings import ServeSettings
from .shared import Shared, Snapshots
from .statistics import Statistics

_log = logging.getLogger("uvicorn.error")


@dataclass
class Answers:
    """Replies by status, and bytes in and out, of the whole process."""

    by_status: Counter[int] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0


class Service:
    """The models, the thread that computes, and the counters; ``shared`` is the folder of all workers, if several."""

    def __init__(self, settings: ServeSettings, shared: Path | None = None) -> None:
        """Load all models.

        Raises:
            CalibError: no folder, no model in it, none that can be loaded, or no such device.
        """
        keep_freed_memory()
        self.settings = settings
        self.compute = Compute(settings.device, settings.precision)
        self._shared = None if shared is None else Shared(shared)
        is_first = self._shared is None or not self._shared.is_behind()
        self.repository = Repository(settings.models, settings.pinned, self.compute, self._shared)
        if is_first:  # of those that follow some may have been unloaded on request
            self.repository.check_any()
        for line in left_out(settings.models):
            _log.warning("not served: %s", line)
        self.engine = Engine(settings.torch_threads, settings.max_pending, settings.max_pending_bytes)
        self.held = Held(settings.max_pending_bytes)
        self.answers = Answers()
        self.snapshots = None if shared is None else Snapshots(shared, self._counters)

    def close(self) -> None:
        """Finish what was accepted, end the thread that computes."""
        self.engine.close()
        if self._shared is not None:
            self._shared.close()

    def _counters(self) -> dict[str, Any]:
        models = {f"{m.name}/{m.version}": m.statistics.as_plain() for m in self.repository.loaded()}
        by_status = {str(status): count for status, count in self.answers.by_status.items()}
        sizes = {"bytes_in": self.answers.bytes_in, "bytes_out": self.answers.bytes_out}
        return {"models": models, "by_status": by_status, "pending": self.engine.pending, **sizes}

    def counters(self) -> list[dict[str, Any]]:
        """Counters of every worker, this one first."""
        return [self._counters()] if self.snapshots is None else self.snapshots.all()

    def statistics(self, models: list[Model]) -> list[Statistics]:
        """Of each of ``models``, over all workers."""
        counters = self.counters()
        names = [f"{m.name}/{m.version}" for m in models]
        return [Statistics.total(c["models"][name] for c in counters if name in c["models"]) for name in names]
