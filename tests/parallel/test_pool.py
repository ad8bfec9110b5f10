"""Worker processes end with the process that started them, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARENT = """
import sys, time
from calib.parallel.pool import Pool
from calib.progress import silent
from tests.parallel.test_pool import job

if __name__ == "__main__":
    with Pool(2) as pool:
        pool.run(job, [sys.argv[1]] * 2, steps=2, label="", progress=silent)
"""


def job(folder: str) -> None:
    """Say who works, and go on for long."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(300)


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    (said := tmp_path / "said").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, said], env=environment) as parent:
        try:
            wait_for(lambda: len(list(said.iterdir())) == 2)
        finally:
            parent.send_signal(signal.SIGKILL)
    workers = [int(p.name) for p in said.iterdir()]
    wait_for(lambda: not any(map(is_running, workers)))


def wait_for(condition: Callable[[], bool]) -> None:
    """At most a minute and a half."""
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
