"""A real browser for tests of pages: Chromium without a window, driven over its DevTools protocol.

`BLIP2TRAIN_BROWSER` names the program; without it the usual names are looked for. `scripts/install_browser.sh` installs
one. aiohttp, which the core depends on, speaks the protocol's WebSocket.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
START_SECONDS = 30.0
ANSWER_SECONDS = 30.0


def find_browser() -> str:
    """Path of a Chromium or Chrome; skips the test where there is none."""
    given = os.environ.get("BLIP2TRAIN_BROWSER")
    found = shutil.which(given) if given else next(filter(None, map(shutil.which, NAMES)), None)
    if given and not found:
        pytest.fail(f"BLIP2TRAIN_BROWSER={given} is no program")
    if not found:
        pytest.skip("no Chromium or Chrome here (scripts/install_browser.sh installs one; or set BLIP2TRAIN_BROWSER)")
    return found


class Page:
    """One open page. Everything it wrote to the console as an error, and every exception, is in `errors`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, loop: asyncio.AbstractEventLoop) -> None:
        self.errors: list[str] = []
        self._socket, self._loop = socket, loop
        self._number = 0
        self._events: list[str] = []

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a local file in a window of this size, and wait until it has loaded."""
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        answer = self._call("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in answer, f"{path}: {answer['errorText']}"
        self._loop.run_until_complete(asyncio.wait_for(self._until("Page.loadEventFired"), ANSWER_SECONDS))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        """Type into whatever has the focus, letter by letter."""
        for letter in text:
            self._call("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def press(self, key: str) -> None:
        """Press a key that writes nothing ("Escape", "Tab")."""
        code = {"Escape": 27, "Tab": 9}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        import base64

        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._ask(method, parameters), ANSWER_SECONDS))

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    async def _until(self, event: str) -> None:
        while event not in self._events:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self._socket.receive_str())
        method, parameters = message.get("method"), message.get("params", {})
        if method:
            self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        if method == "Runtime.consoleAPICalled" and parameters["type"] in {"error", "assert"}:
            self.errors.append(str(parameters["args"]))
        if method == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {parameters['message']}")
            await self._socket.send_json({"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
        return message


@contextmanager
def open_browser() -> Iterator[Page]:
    """A browser with one empty page, closed with everything it started."""
    program = find_browser()
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
        options += ("--no-first-run", "--disable-background-networking", "--remote-debugging-port=0")
        command = [program, *options, f"--user-data-dir={profile}", "about:blank"]
        # a session of its own: the browser is a tree of processes
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        loop = asyncio.new_event_loop()
        session = loop.run_until_complete(_session())
        try:
            socket = loop.run_until_complete(_connect(session, _port(Path(profile), process)))
            page = Page(socket, loop)
            for domain in ("Page", "Runtime", "Log"):
                page._call(f"{domain}.enable")
            yield page
        finally:
            loop.run_until_complete(session.close())
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            loop.close()


def _port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    """The browser writes the port it chose into its profile."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if file.is_file() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"the browser did not start within {START_SECONDS:.0f} s")


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _connect(session: aiohttp.ClientSession, port: int) -> aiohttp.ClientWebSocketResponse:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        pages = [row for row in await answer.json() if row["type"] == "page"]
    return await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
