"""An S3 server on loopback (moto's), and a proxy before it that fails as networks and services do.

The proxy is plain sockets and `http.client`: it hands every request on, counts it, and lets `fault` decide what becomes
of it. So what is tested is what a client meets, resets and cut bodies included, not what a library was told to raise.
"""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

BUCKET = "shelf"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKE0001",
    "AWS_SECRET_ACCESS_KEY": "veryfakesecretveryfakesecret0002",
    "AWS_SESSION_TOKEN": "fakesessiontokenfakesession0003",
}


class Fault(NamedTuple):
    """What becomes of a request; without any of these, what the server makes of it."""

    status: int | None = None
    """Answered so, without the server."""
    code: str = "InternalError"
    reset: bool = False
    """The connection is reset: at once, or, with `after`, behind so many bytes of the answer's body."""
    after: int | None = None
    lost: bool = False
    """The server does it, and the answer gets lost."""
    cut: int | None = None
    """Bytes of the answer that come, as if that were all."""
    flip: int | None = None
    """A bit of this byte of the answer is another."""
    delay: float = 0.0
    """Seconds before anything happens."""
    drop: tuple[str, ...] = ()
    """Headers that the server does not get to see."""


Decide = Callable[[str, str, Any], Fault]
"""Method, path with its query, and headers of a request, to what becomes of it."""


def times(count: int, fault: Fault, method: str = "GET", within: str = "") -> Decide:
    """The fault for the first so many requests of a method whose path contains something."""
    left, lock = [count], threading.Lock()

    def decide(got: str, path: str, headers: Any) -> Fault:
        with lock:
            if got == method and within in path and left[0] > 0:
                left[0] -= 1
                return fault
        return Fault()

    return decide


class Proxy(ThreadingHTTPServer):
    """Hands requests on to the server, or fails."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.decide: Decide = lambda method, path, headers: Fault()
        self.seen: list[tuple[str, str, str | None]] = []
        """Method, path and range of every request."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reset(self) -> None:
        """No faults, nothing seen."""
        self.decide = lambda method, path, headers: Fault()
        self.seen = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were failed hang up: nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the acknowledgement of its header
    server: Proxy

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, self.headers.get("Range")))
        fault = self.server.decide(self.command, self.path, self.headers)
        time.sleep(fault.delay)
        if fault.reset and fault.after is None:
            return self._break()
        if fault.status is not None:
            text = f"<Error><Code>{fault.code}</Code><Message>as asked for</Message></Error>".encode()
            return self._answer(fault.status, [], text)
        status, headers, data = self._upstream(body, fault.drop)
        if fault.lost:
            return self._break()
        if fault.cut is not None:
            data = data[: fault.cut]
        if fault.flip is not None and data:
            at = fault.flip % len(data)
            data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        return self._answer(status, headers, data, fault.after)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_any  # noqa: N815 - names that http.server looks for

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def _upstream(self, body: bytes, drop: tuple[str, ...]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")]
        connection.close()
        return answer.status, kept, data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, after: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if after is None else data[:after])
        if after is not None:
            self.wfile.flush()
            self._break()

    def _break(self) -> None:
        """End the connection with a reset."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """moto's server with one bucket, behind a proxy."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    proxy = Proxy((host, port))
    try:
        yield proxy
    finally:
        proxy.shutdown()
        server.stop()
