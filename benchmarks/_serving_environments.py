"""Virtual environments of the peers and the commands that start them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from _serving_process import Launch, free_ports

SCRIPTS = Path(__file__).parent / "_serving_peers"
# What uvicorn takes for its loop and its parser where it finds them; not every peer asks for them itself. MLServer 1.7
# asks for a current event loop that later versions of uvloop do not make.
PACKAGES = {
    "bentoml": ("uvloop", "httptools"),
    "litserve": ("uvloop", "httptools"),
    "mlserver": ("uvloop<0.22", "httptools"),
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one peer in it."""

    folder: Path
    package: str

    def program(self, name: str) -> str:
        """A program of it."""
        return str(self.folder.absolute() / self.package / "bin" / name)

    def make(self) -> None:
        """Create it where it is missing: the peer, and torch as it is here."""
        if Path(self.program("python")).exists():
            return
        print(f"making an environment for {self.package} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", self.folder / self.package], check=True)
        torch = f"torch=={version('torch').partition('+')[0]}"
        install = [
            self.program("python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            self.package,
            torch,
            "numpy",
            *PACKAGES[self.package],
        ]
        subprocess.run(install, check=True, stdout=sys.stderr)

    def versions(self) -> dict[str, str]:
        """Versions of what matters in it."""
        code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        found = subprocess.run(
            [self.program("python"), "-c", code, self.package, "torch", "uvicorn", "uvloop", "httptools"],
            check=True,
            stdout=subprocess.PIPE,
        )
        return dict(json.loads(found.stdout))


def bentoml(environment: Environment, folder: Path) -> Launch:
    """``bentoml serve`` with one worker."""
    [port] = free_ports(1)
    command = [environment.program("bentoml"), "serve", "bento:Scorer", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(folder / "bentoml")}
    return Launch(command, _names(folder) | quiet, "/readyz", port)


def litserve(environment: Environment, folder: Path, *, fast_queue: bool) -> Launch:
    """One process for HTTP, one worker; the queue between them is a process of its own unless ``fast_queue``."""
    [port] = free_ports(1)
    more = ["--fast-queue"] if fast_queue else []
    command = [environment.program("python"), str(SCRIPTS / "lit.py"), str(port), *more]
    return Launch(command, _names(folder), "/health", port)


def mlserver(environment: Environment, folder: Path, *, gzip: bool) -> Launch:
    """``mlserver start`` with its own settings but for addresses and, if asked for, gzip."""
    http, grpc, metrics = free_ports(3)
    settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    own = folder / f"mlserver-{http}"
    own.mkdir()
    (own / "settings.json").write_text(json.dumps(settings | ({} if gzip else {"gzip_enabled": False})))
    (own / "model-settings.json").write_text(json.dumps({"name": "head", "implementation": "ml.Scorer"}))
    command = [environment.program("mlserver"), "start", str(own)]
    return Launch(command, _names(folder), "/v2/models/head/ready", http)


def _names(folder: Path) -> dict[str, str]:
    """Where the scripts find the head and each other."""
    return {"SERVING_HEAD": str(folder / "head.npz"), "PYTHONPATH": str(SCRIPTS)}
