"""What no server can be cheaper than: the matrix product with its softmax, and a server that computes nothing.

    python benchmarks/_serving_floor.py product HEAD.npz [--bf16]    numbers of calls on stdin, seconds on stdout
    python benchmarks/_serving_floor.py empty BYTES                  a server that answers with so many bytes

Both are started by ``serving.py``.
"""

import argparse
import json
import socket
import sys
import time
from typing import Any

import numpy as np


def product(head: str, *, bf16: bool) -> None:
    """For every line with a number n on stdin: n calls, and a JSON list of their wall seconds on stdout."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    with np.load(head) as stored:
        tensors = [torch.from_numpy(stored[name]) for name in ("features", "weight", "bias")]
    if bf16:
        tensors = [tensor.bfloat16() for tensor in tensors]
    else:
        tensors[0] = tensors[0].float()

    def once() -> float:
        begun = time.perf_counter()
        functional.linear(*tensors).softmax(dim=1)
        return time.perf_counter() - begun

    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps([once() for _ in range(int(line))]), flush=True)


def empty(size: int) -> None:
    """The smallest ASGI application on uvicorn as calib configures it, without an access log."""
    import uvicorn

    answer = bytes(size)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(size).encode())]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        application, loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False, log_config=None
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["product", "empty"])
    parser.add_argument("argument", help="file of the head, or bytes of the answer")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    if options.what == "product":
        product(options.argument, bf16=options.bf16)
    else:
        empty(int(options.argument))
