"""A headless Chromium over its debugging pipe: no driver, no server, only the browser itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WAIT_S = 60.0


def find() -> str | None:
    """The browser's program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page at a time; ``errors`` has what the page wrote to its console as an error, and what it raised."""

    def __init__(self, program: str, folder: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # the browser reads file 3 and writes file 4
        shell = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *options, "--no-first-run", "--disable-dev-shm-usage", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._count, self._session, self._rest = 0, None, b""
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.requests: list[str] = []

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._read)
        os.close(self._write)

    def send(self, method: str, **values: Any) -> Any:
        """A command's answer; errors and requests that are told meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            found = self._message(end - time.monotonic())
            if found is None:
                continue
            if found.get("id") == self._count:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found)
        raise TimeoutError(f"{method} has had no answer for {WAIT_S} s")

    def _message(self, seconds: float) -> dict[str, Any] | None:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0.0, seconds))[0]:
                return None
            data = os.read(self._read, 2**20)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, found: dict[str, Any]) -> None:
        method, values = found.get("method"), found.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(values["args"])[:500])
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"][:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"][:100])

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; promises are waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def look(self, width: int, *, dark: bool = False, touch: bool = False) -> None:
        """How wide the window is, and what its user likes."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path) -> str:
        """Open a report; how many plots it has drawn, as it says itself."""
        self.errors, self.requests = [], []
        self.send("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            drawn = self.value("document.documentElement?.dataset.drawn || ''")
            if drawn:
                return drawn
            time.sleep(0.05)
        raise TimeoutError(f"{path} is not drawn after {WAIT_S} s: {self.errors}")

    def picture(self, path: Path, *, height: int | None = None) -> Path:
        """A PNG of the page, of all of it or of its first pixels."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
