"""The page of a trace, in a real browser: what it shows, finds and says."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec import structs
from playwright.sync_api import Page, sync_playwright
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.trace.findings import findings
from flexkv.trace.load import Trace, load
from flexkv.trace.records import Record
from flexkv.trace.summary import Summary
from flexkv.trace.view import SHOWN_MAX

from .test_trace import CASES, Rig, traced

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
MANY_OPS = 200_000


@pytest.fixture(scope="module")
def demo_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the trace of a short demo."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["--requests", "300", "--host-blocks", "600", "--enable-trace"]
        assert CliRunner().invoke(commands, ["demo", *options]).exit_code == 0
    return folder / "flexkv_trace.log"


def page_of(trace: Path) -> Path:
    """Make the page of a trace by the command."""
    to = trace.with_suffix(".html")
    told = CliRunner().invoke(commands, ["trace", "view", str(trace), "-o", str(to)])
    assert told.exit_code == 0, told.output
    return to


def many(trace: Path, to: Path) -> Path:
    """Write a trace again and again, one run behind the other, until it has enough transfers."""
    read, encode = load(trace), msgspec.json.Encoder().encode
    span = read.end_ns - read.begin_ns
    with to.open("wb") as file:
        file.write(encode(read.header) + b"\n")
        for turn in range(-(-MANY_OPS // len(read.ops))):
            ids, ns = turn * 1_000_000, turn * span
            for record in (*read.plans.values(), *read.ops, *read.requests, *read.samples):
                file.write(encode(_later(record, ids, ns)) + b"\n")
    return to


def _later(record: Record, ids: int, ns: int) -> Record:
    names = record.__struct_fields__
    moved: dict[str, Any] = {n: getattr(record, n) + ns for n in names if n.endswith("_ns")}
    return structs.replace(
        record, **moved, **{n: getattr(record, n) + ids for n in names if n in _IDS}
    )


_IDS = ("run_id", "request_id")


@pytest.fixture
def browser(request: pytest.FixtureRequest) -> Iterator[tuple[Page, list[str]]]:
    """Give a page of a laptop's size without a network, and what goes wrong on it."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page(
            viewport={"width": 1366, "height": 768}, color_scheme=request.param, offline=True
        )
        errors: list[str] = []
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page, errors
        chromium.close()


def opened(page: Page, path: Path) -> None:
    """Open a page, and wait until all is drawn."""
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=20_000)
    page.wait_for_selector("#timeline .main-svg", timeout=20_000)


def axis(page: Page) -> list[float]:
    """Give the stretch of time that the timeline shows."""
    found: list[float] = page.evaluate("document.getElementById('timeline').layout.xaxis.range")
    return found


@pytest.mark.parametrize(
    ("browser", "is_large"),
    [("light", False), ("dark", False), ("dark", True)],
    indirect=["browser"],
    ids=["light, demo", "dark, demo", "dark, 200,000 transfers"],
)
def test_a_page_is_zoomed_searched_and_clicked(
    is_large: bool, demo_trace: Path, tmp_path: Path, browser: tuple[Page, list[str]]
) -> None:
    """Nothing goes wrong; every request tells its plan, and in words where its time went."""
    page, errors = browser
    path = many(demo_trace, tmp_path / "many") if is_large else demo_trace
    summary = Summary(load(path))
    opened(page, page_of(path))
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


class Shown(NamedTuple):
    """A trace, and what its page says."""

    trace: Trace
    findings: str
    events: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shown]:
    """Return what one browser shows of each case."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CASES}
    traces = {
        kind: asyncio.run(traced(Rig(folders[kind], **changes), work))
        for kind, (changes, work) in CASES.items()
    }
    pages = {kind: page_of(folder / "trace") for kind, folder in folders.items()}
    found = {}
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page()
        for kind, path in pages.items():
            opened(page, path)
            told = (page.inner_text("#findings"), page.inner_text("#events"))
            found[kind] = Shown(traces[kind], *told)
        chromium.close()
    return found


@pytest.mark.parametrize("kind", CASES)
def test_what_was_wrong_is_on_the_page(kind: str, shown: dict[str, Shown]) -> None:
    """Its finding in words, and the change of state on the time axis where there was one."""
    page = shown[kind]
    for finding in findings(Summary(page.trace)):
        assert finding.kind in page.findings
        assert finding.text in page.findings
    for event in page.trace.events:
        assert event.kind in page.events
