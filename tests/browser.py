"""A headless Chromium, which tests of pages share."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-pipe",
)  # fmt: skip
# The browser reads its orders from descriptor 3 and writes to 4: they are put there in a process of their own.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless Chromium, worked through its debugging protocol over pipes.

    Args:
        command: the program.
        profile: an empty folder.

    Attributes:
        events: what it told since the last page was opened.
    """

    def __init__(self, command, profile):
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        words = [sys.executable, "-c", LAUNCH, str(orders), str(answers), command, *FLAGS, f"--user-data-dir={profile}"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([*words, "about:blank"], pass_fds=(orders, answers), stdout=quiet, stderr=quiet)
        os.close(orders)
        os.close(answers)
        self._session, self._count, self._rest, self.events = None, 0, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **given):
        """Gives an order and waits for what comes of it."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": given}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._orders, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            part = os.read(self._answers, 2**20)
            assert part, "the browser has gone"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, url, width, dark):
        """Opens an address in a window of a width, and waits until it is loaded."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, script):
        """What a script returns."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script, seconds=60):
        """Waits until a script returns something that is true, and gives it back."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def click(self, selector):
        """Clicks with the mouse in the middle of an element."""
        where = f"document.querySelector({json.dumps(selector)})"
        box = self.run(
            f"(() => {{{where}.scrollIntoView({{block: 'center'}}); const box = {where}.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, selector, text):
        """Clicks into a field and types."""
        self.click(selector)
        self.call("Input.insertText", text=text)

    def picture(self):
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def told(self, *methods):
        """What it told of some kinds."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self):
        """Ends it."""
        self._session = None
        try:
            self.call("Browser.close")
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._orders)
            os.close(self._answers)


def browser(profile):
    """A browser, with an empty folder for its profile; a test that asks for one is skipped where none is installed."""
    command = next(filter(None, map(shutil.which, COMMANDS)), None)
    if command is None:
        pytest.skip(f"no browser is installed: one of {', '.join(COMMANDS)}")
    return Browser(command, profile)
