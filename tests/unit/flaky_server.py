"""A web server on this machine that fails as told: status codes, transfers that break off, silence."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FlakyServer:
    """Serves `files` by path.

    Args:
        files: path -> content.
        faults: what happens to the next requests, one entry each: a status code; ("cut", n) closes after n bytes;
            ("silent", n) sends n bytes and then nothing for `silence_s`.
        ranges: answer range requests.
        chunked: say nothing about the length.
        guarded: paths that begin so need `token` in the Authorization header.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Any] = field(default_factory=list)
    ranges: bool = True
    chunked: bool = False
    silence_s: float = 3.0
    guarded: str | None = None
    token: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(server: FlakyServer) -> Iterator[FlakyServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append((self.path, self.headers.get("Range")))
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
            content = server.files.get(self.path)
            refused = server.guarded and self.path.startswith(server.guarded)
            if refused and self.headers.get("Authorization") != server.token:
                fault = 403
            if isinstance(fault, int) or content is None:
                self.send_response(fault or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            etag = f'"{hash(content)}"'
            asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
            start = 0
            if server.ranges and asked and condition in {None, etag}:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if server.chunked:
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", etag)
            self.end_headers()
            kind, length = fault or ("all", len(content))
            self.wfile.write(content[start:][:length])
            self.wfile.flush()
            if kind == "silent":
                time.sleep(server.silence_s)
            if kind != "all" or server.chunked:
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
