"""The report in a real browser, opened from disk: nothing is fetched, nothing complains, nothing is too wide.

Screenshots go to the folder of MLXTUNE_SCREENSHOTS, where that is set, for a person to look at.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxtune.report import build
from mlxtune.rundir import RunDir
from tests.reported import spoil

pytestmark = pytest.mark.interop

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
WIDTHS = {"phone": 390, "laptop": 1280}
HOSTILE = (
    "</style></svg><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> $x^2$ 你好"
)


class Browser:
    """Chromium over its DevTools pipe: JSON messages that end with a zero byte."""

    def __init__(self, program: str, profile: Path):
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        # Chromium reads its commands from descriptor 3 and answers on 4
        script = f'exec 3<&{to_read} 4>&{to_write}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                script,
                program,
                *FLAGS,
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.rest = b""
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = os.read(self.read_end, 1 << 20)
            assert more, "the browser has gone"
            self.rest += more
        text, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.number += 1
        sent = {"id": self.number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.write_end, json.dumps(sent).encode() + b"\0")
        while (found := self.message()).get("id") != self.number:
            self.events.append(found)
        assert "error" not in found, (method, found)
        result: dict[str, Any] = found["result"]
        return result

    def wait(self, method: str, session: str) -> None:
        def is_it(event: dict[str, Any]) -> bool:
            return event.get("method") == method and event.get("sessionId") == session

        while not any(is_it(event) for event in self.events):
            self.events.append(self.message())

    def close(self) -> None:
        for end in (self.write_end, self.read_end):
            os.close(end)
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def look(browser: Browser, page: Path, name: str, width: int, colours: str, media: str = "") -> dict[str, Any]:
    """Opens a page as a reader would; returns its requests, what it logged, and its measures."""
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    browser.events = []
    for domain in ("Page", "Network", "Log", "Runtime"):
        browser.call(f"{domain}.enable", session)
    mobile = width < 600
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": mobile}
    browser.call("Emulation.setDeviceMetricsOverride", session, **size)
    wanted = [{"name": "prefers-color-scheme", "value": colours}]
    browser.call("Emulation.setEmulatedMedia", session, media=media, features=wanted)
    browser.call("Page.navigate", session, url=page.as_uri())
    browser.wait("Page.loadEventFired", session)

    def value(expression: str) -> Any:
        found = browser.call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        return found["result"]["value"]

    found = {
        "overflow": value("document.documentElement.scrollWidth - document.documentElement.clientWidth"),
        "wide": value(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre') &&"
            " e.getBoundingClientRect().right > document.documentElement.clientWidth).map(e => e.outerHTML)"
        ),
        "cut": value(
            "[...document.querySelectorAll('.scroll table')].filter(e => e.getBoundingClientRect().right >"
            " e.parentElement.getBoundingClientRect().right + 1).map(e => e.className)"
        ),
        "title": value("document.title"),
        "background": value("getComputedStyle(document.body).backgroundColor"),
        "drawings": value("document.querySelectorAll('svg').length"),
        "thin": value(
            "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().height < 40).length"
        ),
        "colours": value("getComputedStyle(document.querySelector('svg .valid path')).stroke"),
    }
    folder = os.environ.get("MLXTUNE_SCREENSHOTS")
    if folder:
        taken = browser.call("Page.captureScreenshot", session, captureBeyondViewport=True)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))
    browser.call("Target.closeTarget", targetId=target)
    mine = [event for event in browser.events if event.get("sessionId") == session]
    requests = [event["params"]["request"]["url"] for event in mine if event["method"] == "Network.requestWillBeSent"]
    kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    return {**found, "requests": requests, "logged": [event for event in mine if event["method"] in kinds]}


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_the_report_opens_from_disk_and_fits(browser: Browser, compared: RunDir, device: str, colours: str) -> None:
    build.write(compared)
    page = compared.report("html")
    found = look(browser, page, f"report-{device}-{colours}", WIDTHS[device], colours)
    assert found["requests"] == [page.as_uri()]
    assert found["logged"] == []
    assert (found["overflow"], found["wide"]) == (0, [])
    assert found["drawings"] == 6 and found["thin"] == 0
    assert found["background"] == {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 23, 26)"}[colours]
    assert found["colours"] == {"light": "rgb(31, 111, 178)", "dark": "rgb(98, 168, 229)"}[colours]


def test_on_paper_it_is_black_on_white(browser: Browser, compared: RunDir) -> None:
    build.write(compared)
    found = look(browser, compared.report("html"), "report-print", 718, "dark", "print")  # A4 without margins of 10 mm
    assert found["background"] == "rgb(255, 255, 255)" and found["overflow"] == 0
    assert found["cut"] == []


def test_hostile_texts_do_nothing(browser: Browser, compared: RunDir) -> None:
    spoil(compared, HOSTILE)
    build.write(compared)
    page = compared.report("html")
    found = look(browser, page, "report-hostile", 390, "light")
    assert found["requests"] == [page.as_uri()] and found["logged"] == []
    assert found["title"].startswith("Tuning report: ") and (found["overflow"], found["wide"]) == (0, [])
