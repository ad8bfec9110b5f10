"""A Google Cloud Storage emulator on loopback, to be run as a process of its own; prints its port and ends with its
standard input.

The emulator does not know preconditions. The store's own behaviour is added here: an upload that may only create
(ifGenerationMatch=0) is answered with 412 where there is an object.
"""

import sys
import threading
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.storage import Storage

one_at_a_time = threading.Lock()


def insert(request: Any, response: Any, storage: Any, *arguments: Any, **named: Any) -> Any:
    with one_at_a_time:
        if request.query.get("ifGenerationMatch") == ["0"]:
            try:
                storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
            except NotFound:
                pass
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        return objects.insert(request, response, storage, *arguments, **named)


if __name__ == "__main__":
    emulator.HANDLERS = tuple(
        (path, {method: insert if handler is objects.insert else handler for method, handler in handlers.items()})
        for path, handlers in emulator.HANDLERS
    )
    handler = partial(emulator.RequestHandler, Storage(use_memory_fs=True))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.shutdown()
