"""Options of commands whose work a cluster can share."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from calib.parallel.ray_engine import RayEngine

Engine = Annotated[str, typer.Option(help="local, or ray: workers of a Ray cluster (docs/scale-clusters.md)")]
Address = Annotated[
    str | None,
    typer.Option(help="of the Ray cluster: HOST:6379, auto [default: $RAY_ADDRESS, or else an instance here]"),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="of --engine ray, at most so many [default: as many as find room]")
]
Cpus = Annotated[float, typer.Option(help="processors of each process of --engine ray; 0.5 is half of one")]


def check_shared(*places: str | None) -> None:
    """Raise UnsupportedError for URLs: those that share the work leave its pieces in a folder that all of them see."""
    from calib.errors import UnsupportedError
    from calib.storage import Remote, parse

    for place in places:
        if place and isinstance(parse(place), Remote):
            raise UnsupportedError(
                f"those that share the work share a folder, and {place} is none",
                hint="write to a folder that all of them see (calib extract --shard i/N takes URLs)",
            )


def engine(
    name: str, address: str | None, processes: int | None, cpus: float, gpus: float | None = 0.0
) -> "RayEngine | None":
    """What ``--engine`` names; None is this process.

    Raises:
        UnknownNameError: no such engine. SettingError: an address for none.
    """
    from calib.errors import SettingError, UnknownNameError
    from calib.parallel.ray_engine import RayEngine

    if name not in ("local", "ray"):
        raise UnknownNameError("engine", name, ["local", "ray"])
    if name == "ray":
        return RayEngine(address, processes or 0, cpus, gpus)
    for option, given in (("--address", address), ("--processes", processes), ("--cpus", cpus != 1)):
        if given:
            raise SettingError(f"{option} is of --engine ray, which was not asked for", hint="add --engine ray")
    return None
