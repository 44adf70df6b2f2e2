"""A real browser for the tests: headless Chromium, driven over the WebDriver protocol, which is plain HTTP and JSON.

Needs Debian's packages: apt-get install --no-install-recommends chromium chromium-driver
"""

import base64
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no browser here: apt-get install --no-install-recommends chromium chromium-driver"
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]


@dataclass(slots=True)
class Browser:
    """One window."""

    address: str

    def go(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns (`return document.title`); a promise is waited for."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def look(self, *, width: int = 1280, dark: bool = False) -> None:
        """Choose the window's width in pixels, and the theme that its user's system asks for."""
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self._tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG."""
        shot = self._tell("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def press(self, key: str) -> None:
        """Press and release a key by its name (`Tab`, `Enter`)."""
        codes = {"Tab": 9, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self._tell("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def _tell(self, command: str, **parameters: Any) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return _ask(method, self.address + path, body)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser of its own, with its files in `profile`, until the block ends."""
    if not CHROMIUM or not DRIVER:
        raise FileNotFoundError(MISSING)
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert driver.stdout is not None
    try:
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        service = f"http://127.0.0.1:{line.rstrip().rstrip('.').rpartition(' ')[2]}"
        chrome = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        session = _ask("POST", f"{service}/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": chrome}}})
        window = Browser(f"{service}/session/{session['sessionId']}")
        try:
            yield window
        finally:
            with suppress(OSError):
                _ask("DELETE", window.address, None)
    finally:
        driver.terminate()
        driver.wait(10)
        driver.stdout.close()


def _ask(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
