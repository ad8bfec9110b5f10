"""``calib methods``."""

from typing import Annotated

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
        print(f"{name}: {method(name).summary}\npaper: {method(name).paper}\nsettings (--set key=value):")
        for key, value in settings.items():
            print(f"  {key} = {','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return
    if as_json:
        print(json.dumps([asdict(m) for m in METHODS.values()]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "paper", "trains", "needs", "in one sentence")
    for m in METHODS.values():
        table.add_row(m.name, m.paper, m.trains, ", ".join(m.needs), m.summary)
    Console().print(table)
