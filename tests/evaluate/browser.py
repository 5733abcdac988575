"""A headless Chromium driven through its own debugging protocol, over a pair of pipes: no driver, no package.

`--remote-debugging-pipe` makes the browser read commands from file descriptor 3 and answer on 4, JSON messages that
end in a zero byte. A dozen commands are enough to click, type and look, as https://chromedevtools.github.io/devtools-
protocol/ describes them.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PATIENCE_S = 60.0
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # it cannot be had in containers, and the only page is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1300,1000",
)


def executable() -> str | None:
    """The first browser of that kind on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One browser with one page."""

    def __init__(self, program: str, profile: Path) -> None:
        ours_in, theirs_out = (_high(fd) for fd in os.pipe())
        theirs_in, ours_out = (_high(fd) for fd in os.pipe())
        self._in, self._out, self._buffer, self._last, self._session = ours_in, ours_out, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        actions = [
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, theirs_in, 3),
            (os.POSIX_SPAWN_DUP2, theirs_out, 4),
        ]
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=actions, setpgroup=0)
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """Ask it to end, and end what is left of its processes."""
        try:
            self.send("Browser.close")
        except (OSError, TimeoutError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command and return its result; events that arrive meanwhile are kept in `events`."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("The browser does not answer.")
            piece = os.read(self._in, 1 << 16)
            if not piece:
                raise OSError("The browser has ended.")
            self._buffer += piece
        head, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(head)
        return message

    def named(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of that name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, page: Path) -> None:
        """Load a file and wait until its script has run."""
        self.events.clear()
        self.send("Page.navigate", url=page.as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._receive())

    def js(self, expression: str) -> Any:
        """The JSON value of an expression in the page; an exception there is an error here."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise AssertionError(f"{expression}: {done['exceptionDetails']}")
        return done["result"].get("value")

    # --- what a reader does ---

    def point(self, selector: str) -> tuple[float, float]:
        """Move the mouse to the middle of the first visible element of that kind."""
        box = self.js(
            f"(() => {{ const e = [...document.querySelectorAll({json.dumps(selector)})].find(e => e.getClientRects()"
            ".length); if (!e) return null; e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = "
            "e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        assert box, f"nothing visible is {selector}"
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        return box[0], box[1]

    def click(self, selector: str) -> None:
        """Press and release the left button there."""
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key on what has the focus."""
        codes = {"Enter": 13, "ArrowDown": 40}
        typed = {"text": "\r"} if key == "Enter" else {}
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=codes[key], **typed
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=codes[key])

    def write(self, selector: str, text: str) -> None:
        """Type into a field."""
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Go down a list with the arrow key until the value is chosen."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find(e => e.getClientRects().length)"
        self.js(f"{found}.focus()")
        for _ in range(12):
            if self.js(f"{found}.value") == value:
                return
            self.press("ArrowDown")
        raise AssertionError(f"{selector} offers no {value}")


def _high(fd: int) -> int:
    """The descriptor moved out of the way of the numbers that the browser gets."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
