"""Tests of the page of a trace in a real browser."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from playwright.sync_api import ConsoleMessage, Error, Page, sync_playwright
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.observe.records import Record
from flexkv.trace.findings import findings
from flexkv.trace.load import Trace, load
from flexkv.trace.summary import Summary
from flexkv.trace.view import SHOWN_MAX
from flexkv.trace.view import page as page_with

from .test_trace import CASES, Rig, traced

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
MANY_OPS = 200_000


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the trace of a short demo, and one of each case in which something is wrong."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CASES}

    async def all_at_once() -> None:
        async with asyncio.TaskGroup() as group:
            for kind, (changes, work) in CASES.items():
                group.create_task(traced(Rig(folders[kind], **changes), work))

    asyncio.run(all_at_once())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo := tmp_path_factory.mktemp("demo"))
        options = ["--requests", "300", "--host-blocks", "600", "--enable-trace"]
        assert CliRunner().invoke(commands, ["demo", *options]).exit_code == 0
    made = {kind: folder / "trace" for kind, folder in folders.items()}
    return {"demo": demo / "flexkv_trace.log", **made}


def page_of(trace: Path) -> Path:
    """Make a trace's page by the command, and return its path."""
    to = trace.with_suffix(".html")
    told = CliRunner().invoke(commands, ["trace", "view", str(trace), "-o", str(to)])
    assert told.exit_code == 0, told.output
    return to


def many(read: Trace) -> Trace:
    """Return copies of a trace, one behind the other, with at least MANY_OPS transfers."""
    whole, span = Trace(read.header), read.end_ns - read.begin_ns
    records = (*read.plans.values(), *read.ops, *read.requests, *read.samples)
    for turn in range(-(-MANY_OPS // len(read.ops))):
        for record in records:
            whole.take(_later(record, turn * 1_000_000, turn * span))
    return whole


def _later(record: Record, ids: int, ns: int) -> Record:
    names = record.__struct_fields__
    moved: dict[str, Any] = {n: getattr(record, n) + ns for n in names if n.endswith("_ns")}
    return structs.replace(
        record, **moved, **{n: getattr(record, n) + ids for n in names if n in _IDS}
    )


_IDS = ("run_id", "request_id")


@pytest.fixture(scope="module")
def tab(traces: dict[str, Path]) -> Iterator[Page]:
    """Yield a tab of a laptop's size without a network.

    One tab serves all tests, so that a page's script is compiled once. The traces are made before,
    since the browser runs an event loop in this thread.
    """
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium.new_page(viewport={"width": 1366, "height": 768}, offline=True)
        chromium.close()


@pytest.fixture
def browser(request: pytest.FixtureRequest, tab: Page) -> Iterator[tuple[Page, list[str]]]:
    """Yield the tab in a colour scheme, and a list of the errors in it."""
    errors: list[str] = []

    def hear(said: ConsoleMessage) -> None:
        if said.type == "error":
            errors.append(said.text)

    def fail(error: Error) -> None:
        errors.append(str(error))

    tab.emulate_media(color_scheme=getattr(request, "param", "light"))
    tab.on("console", hear)
    tab.on("pageerror", fail)
    yield tab, errors
    tab.goto("about:blank")  # a page that draws nothing when the scheme changes
    tab.remove_listener("console", hear)
    tab.remove_listener("pageerror", fail)


def opened(page: Page, path: Path) -> None:
    """Open a page, and wait until all is drawn."""
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=20_000)
    page.wait_for_selector("#timeline .main-svg", timeout=20_000)


def axis(page: Page) -> list[float]:
    """Return the begin and end of the time that the timeline shows."""
    found: list[float] = page.evaluate("document.getElementById('timeline').layout.xaxis.range")
    return found


@pytest.mark.parametrize(
    ("browser", "is_large"),
    [("light", False), ("dark", False), ("dark", True)],
    indirect=["browser"],
    ids=["light, demo", "dark, demo", "dark, 200,000 transfers"],
)
def test_a_page_is_zoomed_searched_and_clicked(
    is_large: bool, traces: dict[str, Path], tmp_path: Path, browser: tuple[Page, list[str]]
) -> None:
    """A page can be zoomed, searched and clicked; each request shows its plan and its times."""
    page, errors = browser
    read = load(traces["demo"])
    summary = Summary(many(read) if is_large else read)
    if is_large:
        path = tmp_path / "many.html"
        path.write_text(page_with(summary), "utf-8")
    else:
        path = page_of(traces["demo"])
    opened(page, path)
    detail = page.inner_text("#detail")
    assert (f"The {SHOWN_MAX} longest of" in detail) == is_large
    for chart in ("rates", "queues", "hits", "latency", "bytes", "steps"):
        assert page.locator(f"#{chart} .main-svg").count(), chart

    begin, end = axis(page)
    box = page.locator("#timeline .nsewdrag").first.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.4, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=5)
    page.mouse.up()
    page.wait_for_function(f"{_RANGE}[1] - {_RANGE}[0] < {0.5 * (end - begin)}")

    get = next(r for r in reversed(summary.trace.requests) if r.hit_blocks.get("disk"))
    page.keyboard.press("/")
    page.keyboard.type(str(get.request_id))
    page.keyboard.press("Enter")
    page.wait_for_selector("#dag .main-svg")
    assert page.inner_text("#words") == summary.breakdowns.of(get).words
    drawn = page.locator("#dag").inner_text() + page.inner_text("#dag")
    assert "disk" in drawn
    assert "answered" in drawn
    arrows = page.locator("#dag .annotation-arrow-g").count()
    plan = summary.trace.plans[get.run_id]
    assert arrows == sum(len(op.after) for op in plan.ops)

    slow = summary.slowest(1)[0]
    page.locator("#slowest tbody tr").first.press("Enter")
    page.wait_for_function(f"document.querySelector('#words').innerText === {slow.words!r}")
    page.fill("#search", "77777777")
    page.press("#search", "Enter")
    assert "no request 77777777" in page.inner_text("#searched")
    assert errors == []


_RANGE = "document.getElementById('timeline').layout.xaxis.range"


@pytest.mark.parametrize("kind", CASES)
def test_what_was_wrong_is_on_the_page(
    kind: str, traces: dict[str, Path], browser: tuple[Page, list[str]]
) -> None:
    """A page shows the text of each finding, and each event on the time axis."""
    page, errors = browser
    opened(page, page_of(traces[kind]))
    trace = load(traces[kind])
    shown, events = page.inner_text("#findings"), page.inner_text("#events")
    for finding in findings(Summary(trace)):
        assert finding.kind in shown
        assert finding.text in shown
    for event in trace.events:
        assert event.kind in events
    assert errors == []
