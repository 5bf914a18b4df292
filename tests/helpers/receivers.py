"""An HTTP server that receives webhooks."""

from __future__ import annotations

import hashlib
import hmac
import json
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "a secret of many characters"


@dataclass(frozen=True)
class Received:
    """A request. host: its Host header."""

    path: str
    host: str
    signature: str
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def is_signed(self, secret: str = SECRET) -> bool:
        """Whether the signature is that of this secret, computed as the documentation says."""
        expected = hmac.new(secret.encode(), self.body, hashlib.sha256).hexdigest()
        return expected in self.signature.split(",")


@dataclass
class Receiver:
    """A server on a free port of this machine, and what it has received."""

    port: int
    received: list[Received] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"localhost:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/hook"


@contextmanager
def receiver(
    statuses: Sequence[int] = (), location: str = "", certificate: tuple[Path, Path] | None = None
) -> Iterator[Receiver]:
    """A receiver that answers with these statuses in turn, then with 204; always with 503 to /broken.

    location: of every response. certificate: files of certificate and key, for https.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.received.append(Received(self.path, self.headers["Host"], self.headers["X-Signature"], body))
            broken = self.path == "/broken"
            self.send_response(503 if broken else made.statuses.pop(0) if made.statuses else 204)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - a followed redirect would be a GET

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # such as broken TLS handshakes
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    made = Receiver(server.server_port, statuses=list(statuses))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
