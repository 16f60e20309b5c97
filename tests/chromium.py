"""A headless Chromium driven over its own debugging pipe: no driver, no network.

python -m tests.chromium PAGE.html PICTURE.png WIDTH HEIGHT [ELEMENT [light|dark]] takes a picture of a page.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


def find_chromium() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """One page in a browser with an empty profile in `folder`; a context manager.

    Attributes:
        problems: what the page reported: exceptions, console warnings and errors, failed loads.
        requests: addresses the page asked for.
    """

    def __init__(self, folder: Path):
        self.folder, self.problems, self.requests = folder, [], []
        self.buffer, self.number = b"", 0

    def __enter__(self):
        (command_out, self.commands), (self.answers, answer_in) = os.pipe(), os.pipe()

        def take_pipes():  # Chromium reads file 3 and writes file 4
            read, write = os.dup(command_out), os.dup(answer_in)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [find_chromium(), *FLAGS, f"--user-data-dir={self.folder}", "about:blank"],
            preexec_fn=take_pipes,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_out), os.close(answer_in)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
        os.close(self.commands), os.close(self.answers)

    def call(self, method: str, **parameters) -> dict:
        """Sends a command of the DevTools protocol and waits for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.buffer:
            chunk = os.read(self.answers, 1 << 20)
            assert chunk, "the browser has ended"
            self.buffer += chunk
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, parameters):
        if method == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.problems.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, page: Path, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Loads a file in a window of that size, in the "light" or "dark" scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        for _ in range(600):
            if self.value("location.protocol + document.readyState") == "file:complete":
                return
            time.sleep(0.05)
        raise AssertionError(f"{page} did not load")

    def value(self, expression: str):
        """What a JavaScript expression gives, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Presses and releases a key as a person would; `text` is what it types."""
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            typed = {"text": text} if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self) -> bytes:
        """PNG of what the window shows."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def main(page: str, picture: str, width: str, height: str, element: str = "html", scheme: str = "light") -> None:
    """Saves a picture of a page from the first `element` (a CSS selector) on."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Chromium(Path(folder)) as browser:
        browser.open(Path(page).resolve(), int(width), int(height), scheme)
        browser.value(f"document.querySelector({json.dumps(element)}).scrollIntoView()")
        Path(picture).write_bytes(browser.screenshot())


if __name__ == "__main__":
    main(*sys.argv[1:])
