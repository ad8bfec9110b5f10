"""uvicorn's HTTP protocol with its one answer that never reaches the application put into the common form."""

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class JsonErrorProtocol(HttpToolsProtocol):
    """Bytes that are not HTTP are answered with ``{"error": ...}`` as well."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close."""
        body = json.dumps({"error": msg}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
