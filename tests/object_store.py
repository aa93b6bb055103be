"""An S3 store on loopback: moto's server in a process of its own, behind a proxy that makes requests fail.

The proxy knows no S3 but its error bodies. What fails is decided request by request: by `fail_next`, or by a
seeded draw (`fail_some`), so that a run of one client is repeatable.

    with ObjectStore() as store:
        store.create_bucket("bucket")
        environ = {**os.environ, **store.environ()}
"""

import contextlib
import http.client
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

import pytest

from nemo_ray import object_store

Fault = Literal["500", "503", "403", "reset", "stall", "lost reply"]
FAULTS: tuple[Fault, ...] = ("500", "503", "reset", "stall", "lost reply")
_ERRORS = {
    "500": ("InternalError", "We encountered an internal error. Please try again."),
    "503": ("SlowDown", "Please reduce your request rate."),
    "403": ("AccessDenied", "Access Denied"),
}
_START_WITHIN_S = 30.0


@dataclass(frozen=True)
class Request:
    """What was asked for, what was done to it, and how many bytes of a body went back."""

    method: str
    path: str
    range: str | None
    signed: bool
    fault: Fault | None
    num_bytes: int


class ObjectStore:
    """Serves until the end of its `with` block. `stall_s`: how long a stalled answer stands still."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.stall_s = 30.0
        self._choose: Callable[[str, str], Fault | None] = lambda method, path: None
        self._lock = threading.Lock()
        self.in_flight = 0

    def __enter__(self) -> "ObjectStore":
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MOTO], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        watchdog = threading.Timer(_START_WITHIN_S, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        assert line, "moto's server did not start"
        self.backend_port = int(line)
        handler = type("Handler", (_Proxy,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._process.terminate()
        self._process.wait(10)

    def url(self) -> str:
        """Where clients find it: the proxy."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environ(self) -> dict[str, str]:
        """Variables of a process that is to use this store."""
        return {
            "AWS_ENDPOINT_URL": self.url(),
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    # -- what fails -------------------------------------------------------------------------------

    def fail_next(self, *faults: Fault, method: str | None = None) -> None:
        """Let the next requests (of a method) fail in these ways, one each."""
        left = list(faults)

        def choose(asked: str, path: str) -> Fault | None:
            return left.pop(0) if left and method in (None, asked) else None

        self._choose = choose

    def fail_always(self, fault: Fault | None, method: str | None = None) -> None:
        """Let every request (of a method) fail; None ends all faults."""
        self._choose = lambda asked, path: fault if method in (None, asked) else None

    def fail_some(self, share: float, seed: int, faults: Sequence[Fault] = FAULTS) -> None:
        """Let a share of the requests fail, each in a way drawn from `faults`."""
        generator = random.Random(seed)

        def choose(asked: str, path: str) -> Fault | None:
            return generator.choice(faults) if generator.random() < share else None

        self._choose = choose

    def fault(self, method: str, path: str) -> Fault | None:
        """What is done to this request, which begins."""
        with self._lock:
            self.in_flight += 1
            return self._choose(method, path)

    def end(self, request: Request) -> None:
        """Note a request that has ended."""
        with self._lock:
            self.in_flight -= 1
            self.requests.append(request)

    def settle(self) -> None:
        """Wait until no request is under way, stalled ones included."""
        deadline = time.monotonic() + self.stall_s + 5
        while self.in_flight and time.monotonic() < deadline:
            time.sleep(0.002)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Request]]:
        """The requests of a `with` block, complete at its end."""
        found: list[Request] = []
        self.settle()  # clients go on when they have the last byte, before the server is done
        before = len(self.requests)
        yield found
        self.settle()
        found += self.requests[before:]

    # -- what is there, past the proxy ------------------------------------------------------------

    def client(self) -> Any:
        """boto3's client of the server itself."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.backend_port}",
            aws_access_key_id="tester",
            aws_secret_access_key="not-a-secret",
            region_name="us-east-1",
        )

    def create_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Contents by key; the empty objects that stand for folders left out."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        found = {}
        for key in keys:
            if not key.endswith("/"):
                with contextlib.suppress(client.exceptions.NoSuchKey):  # deleted since it was listed
                    found[key] = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return found

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.client().put_object(Bucket=bucket, Key=key, Body=data)


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, stall_s: float = 1.5) -> None:
    """For one test: this process talks to the store, which serves again, and gives up on it soon."""
    store.fail_always(None)
    store.settle()
    store.stall_s = stall_s
    for name, value in store.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(object_store, "PATIENCE_S", 0.0)
    monkeypatch.setattr(object_store, "CLIENT_ATTEMPTS", 1)  # its pauses are long
    monkeypatch.setattr(object_store, "REQUEST_TIMEOUT_S", 1.0)
    object_store._connect.cache_clear()


class _Proxy(BaseHTTPRequestHandler):
    """Passes one request on, or makes it fail."""

    store: ObjectStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        fault = self.store.fault(self.command, self.path)
        sent = 0
        try:
            if fault == "reset" and self.command in ("PUT", "POST"):
                self.rfile.read(1)
                self._reset()
                return
            body = self._body()
            sent = self._refuse(fault) if fault in _ERRORS else self._forward(body, fault)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            signed = "Authorization" in self.headers
            asked = self.headers.get("Range")
            self.store.end(Request(self.command, self.path, asked, signed, fault, sent))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        """The request's body; S3 clients send theirs in chunks, so that a checksum can follow."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes, fault: Fault | None) -> int:
        backend = http.client.HTTPConnection("127.0.0.1", self.store.backend_port, timeout=60)
        dropped = ("connection", "transfer-encoding", "content-length", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        backend.request(self.command, self.path, body, headers)
        answer = backend.getresponse()
        data = answer.read()
        backend.close()
        if fault == "stall" and not data:
            self._stall()
        if fault == "lost reply" or (fault == "stall" and not data):
            self._reset()
            return 0
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault in ("reset", "stall"):
            data = data[: len(data) // 2]
        self.wfile.write(data)
        if fault == "stall":
            self.wfile.flush()
            self._stall()
        if fault in ("reset", "stall"):
            self._reset()
        return len(data)

    def _stall(self) -> None:
        """Stand still, until the client gives up."""
        select.select([self.connection], [], [], self.store.stall_s)

    def _refuse(self, status: Any) -> int:
        code, message = _ERRORS[status]
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(int(status))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return len(data)

    def _reset(self) -> None:
        """Close the connection without a goodbye (RST)."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        return


_MOTO = """
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""
