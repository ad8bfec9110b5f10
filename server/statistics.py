"""Counts and times of one model version, in the form of the protocol's statistics extension."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

_NO_CACHE = {name: {"count": 0, "ns": 0} for name in ("cache_hit", "cache_miss")}  # clients of Triton expect them
STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Duration:
    """How often and how long, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """More of it."""
        self.count += count
        self.ns += ns


@dataclass
class Statistics:
    """Only the compute thread writes here; readers may see the counts of a request a moment apart."""

    rows: int = 0
    last_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    reasons: Counter[str] = field(default_factory=Counter)  # of failures

    def as_plain(self) -> dict[str, Any]:
        """All fields as JSON."""
        return {"rows": self.rows, "last_ms": self.last_ms, "reasons": dict(self.reasons)} | {
            stage: asdict(getattr(self, stage)) for stage in STAGES
        }

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Self:
        """The sum of what ``as_plain`` gave in several processes."""
        total = cls()
        for part in parts:
            total.rows += part["rows"]
            total.last_ms = max(total.last_ms, part["last_ms"])
            total.reasons.update(part["reasons"])
            for stage in STAGES:
                getattr(total, stage).add(part[stage]["ns"], part[stage]["count"])
        return total

    def as_json(self) -> dict[str, Any]:
        """``inference_count`` counts rows, ``execution_count`` requests."""
        durations = {name: getattr(self, name) for name in STAGES}
        return {
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": self.success.count,
            "inference_stats": {name: {"count": d.count, "ns": d.ns} for name, d in durations.items()} | _NO_CACHE,
            "batch_stats": [],
        }


class Stopwatch:
    """Times one request: ``submitted_ns`` (perf_counter) to start is queue; each ``lap`` ends a stage."""

    def __init__(self, submitted_ns: int) -> None:
        self._submitted = submitted_ns
        self._laps = [time.perf_counter_ns()]

    def lap(self) -> None:
        """A stage (input, infer, output, in this order) ended now."""
        self._laps.append(time.perf_counter_ns())

    def succeeded(self, statistics: Statistics, rows: int) -> dict[str, float]:
        """Record a request with its three stages; returns milliseconds for the log."""
        start, parsed, computed, written = self._laps
        statistics.rows += rows
        statistics.last_ms = time.time_ns() // 1_000_000
        statistics.success.add(written - self._submitted)
        statistics.queue.add(start - self._submitted)
        statistics.compute_input.add(parsed - start)
        statistics.compute_infer.add(computed - parsed)
        statistics.compute_output.add(written - computed)
        stages = {"queue_ms": start - self._submitted, "compute_ms": computed - start, "write_ms": written - computed}
        return {name: round(ns / 1e6, 3) for name, ns in stages.items()}

    def failed(self, statistics: Statistics, reason: str) -> None:
        """Record a request that was refused."""
        statistics.reasons[reason] += 1
        statistics.fail.add(time.perf_counter_ns() - self._submitted)
