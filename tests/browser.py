"""Headless Chromium, driven through the pipe of its DevTools protocol: no driver, no library and no port."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
PATIENCE = 60.0
"""Seconds for one answer; only a browser that hangs takes as long."""


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. Raises TimeoutError when the browser does not answer, RuntimeError with its message when it refuses."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers, self._buffer, self._count = requests, answers, b"", 0
        self._session: str | None = None
        self.requested: list[str] = []  # addresses, since the page was opened
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Network.enable")
        self.send("Page.enable")
        # Nothing moves: what is on the screen is where it stays.
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[still])

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        limit = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression once it is true."""
        limit = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            if time.monotonic() > limit:
                raise TimeoutError(f"never true: {script}")
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        self.requested.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def click(self, x: float, y: float) -> None:
        """With a real pointer: whatever lies on top there gets it."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click_on(self, selector: str) -> None:
        """In the middle of the element."""
        x, y = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        self.click(x, y)

    def screenshot(self, path: Path, **options: Any) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", **options)["data"]))


@contextmanager
def browser(program: str, profile: Path, size: tuple[int, int] = (1280, 860)) -> Iterator[Page]:
    """A browser with a new profile in the folder ``profile``, and one page of ``size``."""
    to_browser, from_browser = os.pipe(), os.pipe()
    # It reads from its descriptor 3 and writes to 4, which only a shell can place there.
    script = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    command = ["bash", "-c", script, "bash", program, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [*command, f"--window-size={size[0]},{size[1]}"],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        page = Page(to_browser[1], from_browser[0])
        page.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )
        yield page
    finally:
        os.close(to_browser[1])  # the end of its pipe is its end
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_browser[0])
