"""LitServe: one API process, one worker on the CPU, bytes in and out.

    python lit.py PORT [--fast-queue]

LitServe hands the annotation of ``decode_request`` to FastAPI, so a dependency may read the body as it is; without an
annotation it would be parsed as JSON. The dependency makes an array of it, because LitServe formats what it gets into a
debug message that is thrown away: of 2 MB of bytes that takes 20 ms, of an array none. A ``Response`` from
``encode_response`` goes out as it is.
"""

import argparse
from typing import Annotated

import litserve
import numpy as np
from _head import Head
from fastapi import Depends, Request, Response
from torch import Tensor

BINARY = "application/octet-stream"


async def read(request: Request) -> np.ndarray:
    """The numbers of the body."""
    return np.frombuffer(await request.body(), np.float16)


class Scorer(litserve.LitAPI):
    """POST /predict."""

    def setup(self, device: str) -> None:
        self.head = Head()

    def decode_request(self, request: Annotated[np.ndarray, Depends(read)]) -> Tensor:
        return self.head.features(request.data)

    def predict(self, x: Tensor) -> np.ndarray:
        return self.head.scores(x)

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type=BINARY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--fast-queue", action="store_true")
    options = parser.parse_args()
    server = litserve.LitServer(Scorer(), accelerator="cpu", workers_per_device=1, fast_queue=options.fast_queue)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning", access_log=False)
