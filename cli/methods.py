"""``calib methods``."""

import re
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="show the settings of one method")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table of docs/methods.md")] = False,
) -> None:
    """List the calibration methods, or the equations and settings of one.

    Examples: calib methods; calib methods bags; calib methods --json
    """
    import json

    from calib.registry import METHODS, method

    if markdown:
        print(_markdown())
    elif name is not None:
        _show(name, as_json)
    elif as_json:
        print(json.dumps([_plain(method(m)) for m in METHODS]))
    else:
        _list()


def _plain(info: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(info), "needs": info.needs}


def _show(name: str, as_json: bool) -> None:
    import json
    import sys

    from calib.registry import load, method
    from calib.settings import known_keys

    info, settings = method(name), load(method(name).target)
    keys = known_keys(settings())
    if as_json:
        print(json.dumps({**_plain(info), "settings": keys}))
        return
    text = sys.modules[settings.__module__].__doc__ or ""
    print(f"{name}: {info.summary}\npaper: {info.paper}")
    for title, found in (("equation", r"Eq\.[^:]*"), ("differs", "Differs")):
        for part in _sections(text, found):
            print(f"{title}: {part}")
    print(f"trains: {info.trains or 'nothing'}\nbase (--base): {info.base}\nsettings (--set key=value):")
    for key, value in keys.items():
        print(f"  {key} = {_as_text(value)}")


def _list() -> None:
    from rich.table import Table

    from calib.registry import METHODS

    from .console import print_table

    table = Table(box=None)
    table.add_column("method", no_wrap=True)
    for title in ("in one sentence", "trains", "needs", "paper"):
        table.add_column(title, overflow="fold")
    for m in METHODS.values():
        table.add_row(m.name, m.summary, m.trains or "nothing", ", ".join(m.needs), m.paper)
    print_table(table)
    print("\nequations and settings of one: calib methods NAME")


_TITLES = (
    "method",
    "paper",
    "equations",
    "trains",
    "needs",
    "base",
    "settings of its own",
    "where code and paper differ",
)


def _markdown() -> str:
    """One row per method, from the registry and the docstring of the method's file."""
    import sys
    from dataclasses import fields, is_dataclass

    from calib.registry import METHODS, load

    lines = [" | ".join(_TITLES), " | ".join("---" for _ in _TITLES)]
    for m in METHODS.values():
        target = load(m.target)
        settings, text = target(), sys.modules[target.__module__].__doc__ or ""
        own = [f"`{f.name}`" for f in fields(settings) if not is_dataclass(getattr(settings, f.name))]
        equations, differs = (" ".join(_sections(text, title)) for title in (r"Eq\.[^:]*", "Differs"))
        cells = (f"`{m.name}`", m.paper, equations, m.trains or "nothing", ", ".join(m.needs), m.base, ", ".join(own))
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in (*cells, differs)))
    return "\n".join(f"| {line} |" for line in lines)


def _sections(text: str, title: str) -> list[str]:
    """What follows each ``title:`` of a docstring, up to the next title or empty line."""
    end = r"\n\n|\n[A-Z][\w ./]*(?:\([^)]*\))?(?:, [^:\n]*)?: |\Z"
    found = re.findall(rf"^{title}: (.*?)(?={end})", text, re.M | re.S)
    return [" ".join(part.replace("``", "`").split()) for part in found]


def _as_text(value: Any) -> str:
    """A setting as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
