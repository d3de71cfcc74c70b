"""A real HTTP server on a loopback port, which answers as a test says."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What to answer."""

    body: Any = None
    """Bytes as they are; anything else as JSON."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    chunks: Iterator[bytes] | None = None
    """Sent one after the other instead of `body`, without a length."""


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Served:
    """A running server."""

    url: str
    requests: list[Request] = field(default_factory=list[Request])
    """In the order of their arrival."""


@contextmanager
def serving(answer: Callable[[Request], Reply], port: int = 0) -> Iterator[Served]:
    """Answers each request by `answer`, several at once."""

    class OneRequest(BaseHTTPRequestHandler):
        def _any(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(content or b"null"))
            served.requests.append(request)
            reply = answer(request)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.chunks is None:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                for chunk in reply.chunks or [body]:
                    self.wfile.write(chunk)
            except OSError:
                pass  # the client had enough

        do_GET = do_POST = _any

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), OneRequest)
    server.daemon_threads = True
    served = Served(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A loopback port on which nobody listens."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many of them, no two alike: each is held until all are found."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
