"""Looks at a page as people do: wide and narrow, by day and by night, and on paper.

    .venv/bin/python tools/screenshots.py OUT/report.html -o /tmp/shots

Headless Chromium opens the file and writes a PNG of the whole page for every look, and a PDF; by night all that can be
unfolded is. What the page printed to the console, what it asked for besides itself, and where it is wider than the
window is told, and ends with 1. Chromium comes from the system (`apt-get install chromium`) and is no dependency of
effc.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = ((1280, 900), (768, 1024), (390, 844), (360, 740))
SCHEMES = ("light", "dark")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROBLEMS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
WIDEST = "document.documentElement.scrollWidth"
UNFOLD = "document.querySelectorAll('details').forEach(fold => fold.open = {});"

Json = dict[str, Any]


class Browser:
    """Chromium behind two pipes: a command goes in, its answer and what happened meanwhile come out.

    Messages are JSON with a zero byte behind each (`--remote-debugging-pipe`).
    """

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.rest = b""
        self.count = 0
        self.session: str | None = None
        self.events: list[Json] = []

    def __call__(self, method: str, **params: Any) -> Json:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.count:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return dict(found["result"])
            self.events.append(found)

    def wait(self, method: str) -> None:
        while method not in (event.get("method") for event in self.events):
            self.events.append(self._next())

    def _next(self) -> Json:
        while b"\0" not in self.rest:
            found = os.read(self.back, 1 << 20)
            if not found:
                raise RuntimeError("Chromium ended")
            self.rest += found
        first, _, self.rest = self.rest.partition(b"\0")
        return dict(json.loads(first))


@contextmanager
def opened(program: str) -> Iterator[Browser]:
    """A browser with an empty profile, gone when the block ends."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="screenshots-", ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
        ]  # fmt: skip
        # The browser reads from file 3 and writes to file 4.
        shell = f'exec "$0" "$@" 3<&{in_read} 4>&{out_write}'
        run = subprocess.Popen(
            ["bash", "-c", shell, program, *flags],
            pass_fds=(in_read, out_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(in_read), os.close(out_write)
        try:
            yield Browser(in_write, out_read)
        finally:
            os.close(in_write), os.close(out_read)
            run.terminate()
            run.wait(timeout=20)


def look(browser: Browser, page: Path, place: Path) -> list[str]:
    """Write every picture of a page; gives what is wrong with it, in words."""
    target = browser("Target.createTarget", url="about:blank")["targetId"]
    attached = browser("Target.attachToTarget", targetId=target, flatten=True)
    browser.session = attached["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        browser(f"{domain}.enable")
    browser("Page.navigate", url=page.as_uri())
    browser.wait("Page.loadEventFired")
    wrong = []
    for width, height in SIZES:
        for scheme in SCHEMES:
            wide = _show(browser, width, height, scheme)
            if wide > width:
                wrong.append(f"{width}x{height}: the page is {wide} wide")
            file = place / f"{page.stem}-{width}-{scheme}.png"
            shot = browser("Page.captureScreenshot", captureBeyondViewport=True)
            file.write_bytes(base64.b64decode(shot["data"]))
            print(file)
    browser("Emulation.setEmulatedMedia", media="", features=[])
    browser("Runtime.evaluate", expression=UNFOLD.format("false"))
    paper = browser("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
    file = place / f"{page.stem}.pdf"
    file.write_bytes(base64.b64decode(paper["data"]))
    print(file)
    return wrong + _heard(browser.events, page.as_uri())


def _show(browser: Browser, width: int, height: int, scheme: str) -> int:
    """Show the page in a window of that size, and give how wide it is."""
    browser(
        "Emulation.setDeviceMetricsOverride", width=width, height=height,
        deviceScaleFactor=1, mobile=width < 700,
    )  # fmt: skip
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser("Emulation.setEmulatedMedia", features=[feature])
    unfold = UNFOLD.format("true" if scheme == "dark" else "false")
    found = browser("Runtime.evaluate", expression=unfold + WIDEST)
    return int(found["result"]["value"])


def _heard(events: list[Json], itself: str) -> list[str]:
    """What a page said, and what it asked for besides itself."""
    wrong = []
    for event in events:
        method, params = event.get("method"), event.get("params", {})
        if method in PROBLEMS:
            wrong.append(f"console: {json.dumps(params)[:300]}")
        if method == "Network.requestWillBeSent" and params["request"]["url"] != itself:
            wrong.append(f"request: {params['request']['url']}")
    return wrong


def requests(events: list[Json]) -> list[Mapping[str, Any]]:
    return [
        e["params"]["request"] for e in events if e.get("method") == "Network.requestWillBeSent"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("page", type=Path, nargs="+", help="HTML files")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the pictures")
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        print("no Chromium here; `apt-get install -y chromium` gets it", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    for page in arguments.page:
        with opened(program) as browser:
            wrong += [f"{page}: {line}" for line in look(browser, page.resolve(), arguments.out)]
            made = len(requests(browser.events))
        print(
            f"{page}: {made} request, the page itself" if made == 1 else f"{page}: {made} requests"
        )
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
