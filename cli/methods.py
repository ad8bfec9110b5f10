"""``calib methods``."""

from typing import Annotated, Any

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="show the settings of one method")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
) -> None:
    """List the calibration methods, or the settings of one.

    Examples: calib methods; calib methods bags; calib methods --json
    """
    import json
    from dataclasses import asdict

    from calib.registry import METHODS, load, method

    if name is not None:
        from calib.settings import known_keys

        settings = known_keys(load(method(name).target)())
        if as_json:
            print(json.dumps({**asdict(method(name)), "settings": settings}))
            return
        print(f"{name}: {method(name).summary}\npaper: {method(name).paper}\nbase (--base): {method(name).base}")
        print("settings (--set key=value):")
        for key, value in settings.items():
            print(f"  {key} = {_as_text(value)}")
        return
    if as_json:
        print(json.dumps([asdict(m) for m in METHODS.values()]))
        return
    from rich.table import Table

    from .console import print_table

    table = Table(box=None)
    table.add_column("method", no_wrap=True)
    for title in ("in one sentence", "trains", "needs", "paper"):
        table.add_column(title, overflow="fold")
    for m in METHODS.values():
        table.add_row(m.name, m.summary, m.trains, ", ".join(m.needs), m.paper)
    print_table(table)
    print("\nsettings of one: calib methods NAME")


def _as_text(value: Any) -> str:
    """A setting as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)
