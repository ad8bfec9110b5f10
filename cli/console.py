"""What all commands share: progress bars on stderr, results on stdout, errors with a next step and exit code 2."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from calib.errors import CalibError, SettingError, UnsupportedError, is_unicode
from calib.progress import Bar

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What pathlib makes of a URL: it takes the second slash away.
COLLAPSED = re.compile(r"(s3a?|gc?s|file|https?|az|abfss?|hdfs|ftp):/", re.IGNORECASE)


def path_or_url(text: str) -> Path:
    """Parser of an option that is read: of a URL the local copy (see ``calib.storage.local``)."""
    if not URL.match(text):
        return Path(text)
    from calib.storage import local

    return local(text)


def tell(line: str) -> None:
    """A note on stderr."""
    typer.echo(line, err=True)


def with_local_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command``, which refuses URLs where it takes plain paths: it would make a folder named ``s3:`` of them; and
    what is no Unicode text, which no table can name."""

    @wraps(command)
    def run(**arguments: Any) -> Any:
        for name, value in arguments.items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str | Path) and not is_unicode(str(path)):
                    raise SettingError(
                        f"{name.replace('_', '-')} is no Unicode text: {str(path)!r}",
                        hint="give names and values in UTF-8",
                    )
                if isinstance(path, Path) and COLLAPSED.match(str(path)):
                    raise UnsupportedError(
                        f"{name.replace('_', '-')} takes a local path, not a URL ({str(path).replace(':/', '://', 1)})",
                        hint="docs/scale-storage.md lists what takes URLs; copy it first with your store's own tool",
                    )
        return command(**arguments)

    return run


class CalibGroup(TyperGroup):
    """A command group that prints ``CalibError`` as ``error: ...`` and ``hint: ...`` on stderr and exits with 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit 2 on an error the user can mend, 130 on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except CalibError as e:
            _explain(str(e), e.hint)
            ctx.exit(2)
        except BrokenPipeError:
            raise  # whoever read our output has enough; click ends quietly
        except OSError as e:
            place = f"{e.filename}: " if e.filename else ""
            is_in_the_way = isinstance(e, FileExistsError | NotADirectoryError)
            _explain(
                f"{place}{e.strerror or e}",
                "a file stands where a folder is needed"
                if is_in_the_way
                else "may it be read and written, and is there space on the disk?",
            )
            ctx.exit(2)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
            how = "again with --resume" if ctx.invoked_subcommand in ("extract", "import") else "again"
            typer.echo(f"interrupted: no output is half-written; run the same command {how} to go on", err=True)
            ctx.exit(130)


def exit_code(do: Callable[[], object]) -> int:
    """Of a script beside the package, which does ``do``: 0, or 2 with the error and its next step on stderr."""
    try:
        do()
    except CalibError as e:
        _explain(str(e), e.hint)
        return 2
    return 0


def _explain(message: str, hint: str) -> None:
    typer.echo(named(f"error: {message}"), err=True)
    if hint:
        typer.echo(named(f"hint: {hint}"), err=True)


def named(text: object) -> str:
    """``text`` with the local copies of what lies in object storage, if there are any, called by their URLs."""
    storage = sys.modules.get("calib.storage")
    return str(storage.as_named(str(text))) if storage else str(text)


def with_optional_values(defaults: dict[str, str]) -> type[TyperCommand]:
    """A command some of whose options may stand without a value, which is then that of ``defaults``."""

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            filled: list[str] = []
            for arg, following in zip(args, [*args[1:], "--"], strict=True):
                filled.append(arg)
                if arg in defaults and following.startswith("-"):
                    filled.append(defaults[arg])
            return super().parse_args(ctx, filled)

    return Command


class _RichBar:
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, n: int = 1, **metrics: float) -> None:
        note = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        self._progress.update(self._task, advance=n, note=note) if metrics else self._progress.update(
            self._task, advance=n
        )


@contextmanager
def bar(label: str, *, total: int, unit: str) -> Iterator[Bar]:
    """A progress bar on stderr (``calib.progress.Progress``): share done, rate, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn(unit + " {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=False) as progress:
        yield _RichBar(progress, progress.add_task(label, total=total, note=""))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rich_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Any:
    """Rows of equal keys; columns are left-aligned where the first row holds words."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, title=title, title_justify="left")
    for key, value in rows[0].items() if rows else ():
        table.add_column(key, justify="left" if str(value)[:1].isalpha() else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(v)) for v in row.values()))  # Text: square brackets in names are not markup
    return table


def print_table(table: Any) -> None:
    """Print a rich table on stdout. Where there is no terminal nothing says how wide lines may be: they are wide."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def show(shown: Sequence[Any], record: Mapping[str, Any], as_json: bool) -> None:
    """Print on stdout the tables (``calib.tables.Tables``) of ``shown``, or ``record`` as one JSON object."""
    import json

    if as_json:
        print(json.dumps(record))
        return
    for title, rows in (table for one in shown for table in one.tables()):
        print_table(rich_table(rows, title))
        print()


def report(metrics: dict[str, Any], as_json: bool) -> None:
    """Print metrics on stdout: one JSON object, or a line each."""
    import json

    if as_json:
        print(json.dumps(metrics))
        return
    width = max(len(k) for k in metrics)
    for key, value in metrics.items():
        print(f"{key:{width}}  {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
