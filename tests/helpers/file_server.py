"""A local HTTP server for tests that fails as real ones do."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STALL = 2.0  # seconds; longer than the time limit that the tests set


class FileServer:
    """Serves a folder. `faults[path]` lists what goes wrong with the next GETs of it, then all goes well:
    "503", "drop" (half the body, then the connection is closed), "stall" (half the body, then silence), a status.
    """

    def __init__(self, folder: Path):
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str]] = []  # method, path
        self.watch: Callable[[], None] = lambda: None  # called while a body is half sent
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests.append((method, path))
            return self.faults[path].pop(0) if method == "GET" and self.faults[path] else None

    def gets(self, suffix: str) -> list[str]:
        return [path for method, path in self.requests if method == "GET" and path.endswith(suffix)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: FileServer, *arguments, **options):
        self.owner = owner
        super().__init__(*arguments, **options)

    def do_GET(self):
        path = self.path.split("?")[0]
        fault = self.owner.next_fault("GET", path)
        if fault is not None and fault.isdigit():
            self.send_error(int(fault))
            return
        file = self.send_head()
        if file is None:
            return
        with file:
            body = file.read()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.owner.watch()
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(STALL)
        self.wfile.write(body[len(body) // 2 :])

    def do_HEAD(self):
        self.owner.next_fault("HEAD", self.path.split("?")[0])
        super().do_HEAD()

    def log_message(self, *arguments):
        pass
