"""Worker processes end with the process that started them, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from calib.errors import ProcessError
from calib.parallel.pool import run_all, worker_progress
from calib.progress import silent

from ..conftest import HEED_CTRL_C

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


def test_rendering_ends_when_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calib.cli", "data", "shapes", "--out", str(tmp_path / "set"), "--processes", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        try:
            wait_for(lambda: len(workers_of(parent.pid)) == 2)
            workers = workers_of(parent.pid)
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(is_running, workers)))


def workers_of(parent: int) -> list[int]:
    """Processes that multiprocessing started for work."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in children}
    return [pid for pid, path in commands.items() if path.exists() and b"spawn_main" in path.read_bytes()]


def killed(number: int) -> None:
    """The second job ends its process."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ProcessError) as caught:
        run_all(killed, [0, 1], processes=2, steps=2, label="", progress=silent)
    assert "--processes" in caught.value.hint


def test_a_checkout_in_the_folder_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """A user clones calib to ``./calib`` and runs it beside: processes find the package, not that folder."""
    (tmp_path / "calib" / "docs").mkdir(parents=True)
    (tmp_path / "mine.py").write_text("def build():\n    return None\n")
    script = tmp_path / "scripts" / "run.py"
    script.parent.mkdir()
    script.write_text(
        "from calib import __version__\n"
        "from calib.extract.weights import imported\n"
        "from calib.parallel.pool import run_all\n"
        "from calib.progress import silent\n"
        "from time import sleep\n"
        "if __name__ == '__main__':\n"
        "    assert imported('mine:build')() is None\n"
        "    run_all(sleep, [0, 0], processes=2, steps=2, label='', progress=silent)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wait_for(condition: Callable[[], bool]) -> None:
    """At most a minute and a half."""
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def count_in(unit: str) -> None:
    """Advances a bar of ``unit`` for a while."""
    with worker_progress("work", total=40, unit=unit) as bar:
        for _ in range(40):
            time.sleep(0.01)
            bar.advance(10)


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_alone_reach_the_bar(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # workers import this module
    bar = Counted()

    @contextmanager
    def progress(label: str, *, total: int, unit: str) -> Iterator[Counted]:
        yield bar

    run_all(count_in, ["steps", "rows"], processes=workers, steps=400, label="jobs", progress=progress)
    assert bar.n == 400 if workers == 1 else 0 < bar.n <= 400  # the last report may come too late


class Counted:
    n = 0

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.n += n


def test_a_second_ctrl_c_ends_workers_that_do_not_listen(tmp_path: Path) -> None:
    """Without it the first one waits for their jobs, here five minutes, and so would the end of the process."""
    script = tmp_path / "parent.py"
    script.write_text(f"{HEED_CTRL_C}\n{PARENT}")
    (said := tmp_path / "said").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, said], env=environment, stderr=subprocess.PIPE) as parent:
        try:
            wait_for(lambda: len(list(said.iterdir())) == 2)
            parent.send_signal(signal.SIGINT)
            time.sleep(0.3)
            parent.send_signal(signal.SIGINT)
            assert parent.wait(timeout=60) != 0
        finally:
            parent.kill()
    assert not any(is_running(int(p.name)) for p in said.iterdir())
