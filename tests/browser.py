"""Pages in a headless Chromium, over its DevTools pipe: what they draw, log, ask the network for, and look like.

    python -m tests.browser PAGE OUT.png --width 1200

PAGE: a URL or a file. The picture of the documentation is made with --height 1180 --window --small.
"""

import argparse
import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
)
_PATIENCE_S = 30.0
_BUTTONS = {"none": 0, "left": 1}


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """A Chromium of its own, with an empty profile, as a context manager. Raises FileNotFoundError where none is
    installed."""

    def __init__(self) -> None:
        if (program := find_chromium()) is None:
            raise FileNotFoundError("no Chromium is installed")
        self._profile = tempfile.mkdtemp(prefix="browser-")
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root may have no sandbox
        # Chromium takes its orders from descriptor 3 and answers on 4; copied high up, neither overwrites the other.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there, back)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [program, *_FLAGS, *sandbox, f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place,
            pass_fds=(3, 4),
            start_new_session=True,
        )
        for end in (there, back, *ends):
            os.close(end)
        self._unread, self._calls = b"", 0
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            self.call("Browser.close", timeout_s=5.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)

    def page(self, url: str, width: int = 1000, height: int = 800, *, dark: bool = False) -> "Page":
        """Open `url` and wait until it has loaded."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.prefer(dark=dark)
        page.go(url)
        return page

    def call(
        self,
        method: str,
        parameters: Mapping[str, Any] | None = None,
        session: str | None = None,
        timeout_s: float = _PATIENCE_S,
    ) -> dict[str, Any]:
        """The result of a DevTools method. Raises RuntimeError with what Chromium refuses, TimeoutError."""
        self._calls += 1
        number = self._calls
        message = {"id": number, "method": method, "params": dict(parameters or {})}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        for answer in self._messages(timeout_s):
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
        raise TimeoutError(f"{method}: no answer in {timeout_s:g} s")

    def listen(self, seconds: float) -> None:
        """Take what pages tell of themselves."""
        for _ in self._messages(seconds):
            pass

    def _messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Those of the coming `seconds`; events are given to their page first."""
        deadline = time.monotonic() + seconds
        while True:
            while b"\0" in self._unread:
                text, self._unread = self._unread.split(b"\0", 1)
                message = json.loads(text)
                if (page := self._pages.get(message.get("sessionId", ""))) and "method" in message:
                    page.hear(message["method"], message["params"])
                yield message
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                return
            if not (data := os.read(self._in, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._unread += data


@dataclass
class Page:
    """A tab. errors: console errors, uncaught exceptions and failed loads. requests: URLs asked for, in their order,
    those of the page itself among them."""

    browser: Browser
    session: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, parameters, self.session)

    def go(self, url: str) -> None:
        """Raises RuntimeError for a page that cannot be reached, TimeoutError for one that does not end to load."""
        self.loaded = False
        told = self.call("Page.navigate", url=url)
        if "errorText" in told:
            raise RuntimeError(f"{url}: {told['errorText']}")
        deadline = time.monotonic() + _PATIENCE_S
        while not self.loaded:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url}: not loaded in {_PATIENCE_S:g} s")
            self.browser.listen(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it; a promise's, once it is there."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {_thrown(told['exceptionDetails'])}")
        return told["result"].get("value")

    def wait(self, expression: str, timeout_s: float = _PATIENCE_S) -> Any:
        """The value of `expression` once it is true to JavaScript's mind."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression}: not in {timeout_s:g} s")
            self.browser.listen(0.05)
        return value

    def resize(self, width: int, height: int = 800) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, *, dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def mouse(self, kind: str, x: float, y: float, button: str = "none", clicks: int = 0) -> None:
        """kind: mouseMoved, mousePressed or mouseReleased. x, y: in the window, from its upper left corner."""
        buttons = 0 if kind == "mouseReleased" else _BUTTONS[button]
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=clicks
        )  # fmt: skip

    def click(self, x: float, y: float, times: int = 1) -> None:
        for count in range(1, times + 1):
            self.mouse("mousePressed", x, y, "left", count)
            self.mouse("mouseReleased", x, y, "left", count)

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.mouse("mousePressed", x, y, "left", 1)
        for part in (0.3, 0.7, 1.0):
            self.mouse("mouseMoved", x + part * (to_x - x), y + part * (to_y - y), "left")
        self.mouse("mouseReleased", to_x, to_y, "left", 1)

    def key(self, key: str, code: str = "", text: str = "") -> None:
        """Press and release; key as in KeyboardEvent.key."""
        keys = {"key": key, "code": code or key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **keys, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """As PNG. whole: all of the page, below the window's edge too."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))

    def hear(self, event: str, told: Mapping[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(_thrown(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(each.get("value", each.get("description"))) for each in told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}".strip())


def _thrown(details: Mapping[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details.get("text"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Take a picture of a page; exit code 1 where it logs an error.")
    parser.add_argument("page", help="a URL, or a file")
    parser.add_argument("out", type=Path, help="a PNG file")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels")
    parser.add_argument("--height", type=int, default=800, help="of the window; the picture is as high as the page")
    parser.add_argument("--window", action="store_true", help="only what is in the window")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--after", default="true", help="a JavaScript expression that must be true first")
    parser.add_argument("--small", action="store_true", help="a small file, of 128 colours")
    asked = parser.parse_args()
    url = asked.page if "://" in asked.page else Path(asked.page).resolve().as_uri()
    with Browser() as browser:
        page = browser.page(url, asked.width, asked.height, dark=asked.dark)
        page.wait(asked.after)
        page.screenshot(asked.out, whole=not asked.window)
    if asked.small:
        from PIL import Image

        Image.open(asked.out).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(asked.out, optimize=True)
    for error in page.errors:
        print(error)
    raise SystemExit(1 if page.errors else 0)


if __name__ == "__main__":
    main()
