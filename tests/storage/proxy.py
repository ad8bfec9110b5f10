"""A TCP proxy between calib and the server that can do to connections what networks do."""

import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

BLOCK = 1 << 14
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class Proxy:
    """Listens on ``port`` and hands bytes on to ``upstream``.

    ``cut(seed, most)``: from now on every other connection is reset after at most ``most`` bytes of both directions;
    ``cuts`` counts them. ``request`` and ``response`` see every block and may change it.
    """

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        self._budgets: random.Random | None = None
        self._most = 0
        self._open: set[socket.socket] = set()
        self.calm()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seed: int, most: int) -> None:
        self._budgets, self._most = random.Random(seed), most
        self._hang_up()

    def calm(self) -> None:
        """Hand everything on as it comes."""
        self._budgets = None
        self.request: Callable[[bytes], bytes] = lambda block: block
        self.response: Callable[[bytes], bytes] = lambda block: block

    def close(self) -> None:
        self._listener.close()
        self._hang_up()

    def _hang_up(self) -> None:
        """Connections that are kept alive had no budget."""
        for side in list(self._open):
            side.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._upstream))
            budgets = self._budgets
            left = [budgets.randrange(1, self._most) if budgets and budgets.random() < 0.5 else 1 << 60]
            self._open |= {client, server}
            for source, target, change in ((client, server, "request"), (server, client, "response")):
                threading.Thread(target=self._pump, args=(source, target, change, left), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, change: str, left: list[int]) -> None:
        try:
            while block := source.recv(BLOCK):
                allowed = min(len(block), left[0])
                left[0] -= len(block)
                target.sendall(getattr(self, change)(block[:allowed]))
                if left[0] <= 0:
                    self.cuts += 1
                    for side in (source, target):
                        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
        except OSError:
            pass
        for side in (source, target):
            self._open.discard(side)
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()
