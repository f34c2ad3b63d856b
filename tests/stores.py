"""Servers on loopback that hold a converted set: one that speaks S3, and one that speaks plain HTTP, with faults."""

from __future__ import annotations

import http.server
import os
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BUCKET = "pictures"


@dataclass
class Served:
    """A data set at an address, and what was asked of it."""

    url: str
    folder: Path
    gets: Counter[str] = field(default_factory=Counter)
    """How often each file was asked for."""
    puts: Counter[str] = field(default_factory=Counter)
    """How often each file was written."""
    faults: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By file, what goes wrong with the next requests for it, one after the other; a last `always ...` stays."""

    def fault(self, name: str) -> str:
        left = self.faults[name]
        if left and left[0].startswith("always "):
            return left[0].removeprefix("always ")
        return left.pop(0) if left else ""

    def tars(self, split: str = "train") -> dict[str, int]:
        """How often each tar of a split was asked for."""
        return {name: count for name, count in sorted(self.gets.items()) if name.startswith(split) and ".tar" in name}


@contextmanager
def http_store(folder: Path) -> Iterator[Served]:
    """`folder` behind HTTP. Faults: 500, 403, 404, drop (half of the bytes, then the connection ends), wrong, slow."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            name = self.path.rpartition("/")[2]
            path = folder / (name if self.path == f"/set/{name}" else "nothing")
            if body:
                served.gets[name] += 1
            fault = served.fault(name) if body else ""
            if fault.isdecimal() or not path.is_file():
                self.send_error(int(fault) if fault.isdecimal() else 404)
                return
            content = path.read_bytes()
            if fault == "wrong":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/octet-stream")
            self.end_headers()
            if not body:
                return
            if fault == "drop":
                self.wfile.write(content[: len(content) // 2])
                return
            for begin in range(0, len(content), 8192):
                if fault == "slow":
                    time.sleep(0.1)
                self.wfile.write(content[begin : begin + 8192])

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *about: Any) -> None: ...  # a client that was killed

    with Server(("127.0.0.1", 0), Handler) as server:
        served = Served(f"http://127.0.0.1:{server.server_address[1]}/set", folder)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def s3_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bucket: str = BUCKET, *, nested: bool = False
) -> Iterator[Served]:
    """The files of `folder` in a bucket of moto's server, which the environment names; `nested`: with all below and
    what is hidden. Faults: 500, 503, 403, 404, wrong, drop, short (half of the bytes, as if that were all), of what is
    read and of what is written; also of `list`, which stands for every listing."""
    moto_app = pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *words: Any) -> None: ...

    backend = moto_app.DomainDispatcherApplication(moto_app.create_backend_app)

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        name, method = environ["PATH_INFO"].rpartition("/")[2].encode("latin-1").decode(), environ["REQUEST_METHOD"]
        listing = "list-type" in environ.get("QUERY_STRING", "")
        if method not in ("GET", "PUT") or not name or (listing and not served.faults["list"]):
            return backend(environ, start_response)
        if listing:
            name = "list"
        (served.gets if method == "GET" else served.puts)[name] += 1
        fault = served.fault(name)
        if fault.isdecimal():
            start_response(f"{fault} Fault", [("Content-Type", "application/xml")])
            code = {"403": "AccessDenied", "404": "NoSuchKey", "503": "SlowDown"}.get(fault, "InternalError")
            return [f"<Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()]
        if fault == "short":
            answer: list[Any] = []
            content = b"".join(backend(environ, lambda *told: answer.extend(told)))
            content = content[: len(content) // 2]
            start_response(answer[0], [*(h for h in answer[1] if h[0].lower() != "content-length"),
                                       ("Content-Length", str(len(content)))])  # fmt: skip
            return [content]
        content = b"".join(backend(environ, start_response))
        if fault == "drop":
            return [content[: len(content) // 2]]
        return [content[:-1] + bytes([content[-1] ^ 1])] if fault == "wrong" else [content]

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Silent)
    served = Served(f"s3://{bucket}/sets/small", folder)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        import boto3

        reset = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset).close()  # moto keeps buckets as long as the process lives
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        for path in folder.rglob("*") if nested else folder.iterdir():
            if path.is_file() and (nested or not path.name.startswith(".")):
                name = path.relative_to(folder).as_posix()
                client.put_object(Bucket=bucket, Key=f"sets/small/{name}", Body=path.read_bytes())
        served.gets.clear()
        served.puts.clear()
        yield served
    finally:
        server.shutdown()
        thread.join()


def s3() -> Any:
    """The store that the environment names, as it is now."""
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True)


@contextmanager
def empty_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A bucket in which there is nothing; `folder` is for a folder that is as empty."""
    (folder / "empty").mkdir()
    with s3_store(folder / "empty", monkeypatch) as served:
        yield served


def one_by_one(function: Any, tasks: Any, jobs: int, on_result: Any, *_: Any) -> None:
    """In place of a conversion's `map_tasks`: in this process, where patches are seen."""
    for task in tasks:
        on_result(function(task))
