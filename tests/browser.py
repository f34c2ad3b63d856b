"""A headless Chromium without a network, driven through its debugging port."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--remote-debugging-port=0", "--remote-allow-origins=*",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Page:
    """One page, opened from disk. `errors` collects what its scripts threw and what it could not load."""

    def __init__(self, path: Path, profile: Path, *, width: int = 1200, dark: bool = False) -> None:
        import websocket

        self.errors: list[str] = []
        self._number = 0
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _wait_for(lambda: _first_line(profile / "DevToolsActivePort"))
            pages = _wait_for(lambda: [page for page in _pages(port) if page["type"] == "page"])
            self._socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=60)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self.resize(width)
            self.call(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
            )
            self.call("Page.navigate", url=path.resolve().as_uri())
            _wait_for(lambda: self.run("document.readyState === 'complete' && location.protocol === 'file:'"))
        except BaseException:
            self._process.kill()
            raise

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            self.errors.append(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            entry = message.get("params", {})
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(entry["exceptionDetails"]))
            elif message.get("method") == "Log.entryAdded" and entry["entry"]["level"] == "error":
                self.errors.append(entry["entry"]["text"])
            elif message.get("method") == "Network.requestWillBeSent":
                url = entry["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    self.errors.append(f"asked for {url}")

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _first_line(path: Path) -> str | None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return lines[0] if lines else None


def _pages(port: str) -> Any:
    with urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
        return json.load(answer)


def _wait_for(what: Any, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "the browser did not answer"
        time.sleep(0.05)
    return value
