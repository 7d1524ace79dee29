"""The live page in headless Chromium: what it shows of a known load, and who can use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from live_server import RunningServer, hanging, post

from minserve.request import FinishReason
from minserve.server_config import ServerConfig
from minserve.slo.objectives import SLO
from parts.page_picture.chromium import CHROMIUM, NO_CHROMIUM, BrowserPage, chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

PROMPT = "The rain in Spain"
# Nothing on this page may miss the first class or keep the second one, on any machine.
CLASSES = {
    "patient": SLO(ttft=900.0, tpot=900.0),
    "hasty": SLO(ttft=1e-6, tpot=900.0),
}
LIVE = "document.getElementById('connection').textContent === 'Live'"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserPage]:
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def busy(start_server: Callable[..., RunningServer], tiny_llama_dir: Path) -> RunningServer:
    """A server that has had four requests."""
    config = ServerConfig(served_model_name="tiny")
    server = start_server(tiny_llama_dir, config, slo_classes=CLASSES)
    for slo in ("patient", "patient", "hasty", None):
        body = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "slo": slo}
        assert post(server, "/v1/completions", body)[0] == 200
    server.wait_until_free()
    return server


def text(page: BrowserPage, selector: str) -> str:
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


def visit(page: BrowserPage, server: RunningServer) -> None:
    page.complaints.clear()
    page.look(1280, 900)
    page.go(f"{server.url}/")
    page.wait_for(LIVE)
    page.wait_for("document.querySelectorAll('#tiles dd').length")
    # All requests are in sight, however slow the machine is.
    page.evaluate("document.getElementById('span').value = '120'")
    page.evaluate("document.getElementById('span').dispatchEvent(new Event('change'))")


def answer_of(page: BrowserPage) -> str:
    """How the newest chat was served, once it has ended."""
    page.wait_for("document.getElementById('stop').disabled")
    return text(page, ".turn:last-child .kept")


def test_it_shows_what_the_requests_did(page: BrowserPage, busy: RunningServer) -> None:
    visit(page, busy)
    page.wait_for("document.querySelectorAll('#lanes code').length === 4")
    rows = page.evaluate(
        "[...document.querySelectorAll('#attainment tbody tr')].map("
        "row => [...row.children].map(cell => cell.textContent))"
    )
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("hasty", "0 %", "0 of 1"),
        ("patient", "100 %", "2 of 2"),
    ]
    assert "2 of 3" in text(page, "#tiles")
    num = sum(busy.engine.stats().iteration_s.counts)
    assert f"The last {num}," in text(page, "#iterations-words")
    bars = "document.querySelector('#iteration-times .actual').getAttribute('d').split('M').length"
    assert page.evaluate(bars) - 1 == num
    said = text(page, "#lanes")
    assert said.count("patient") == 2
    assert said.count("hasty") == said.count("no SLO") == said.count("late") == 1
    lane = "document.querySelector('#lanes svg').getAttribute('aria-label')"
    assert "8 output tokens" in page.evaluate(lane)
    assert PROMPT not in page.evaluate("document.body.innerText")
    # The same as a table, for who does not see it.
    page.evaluate("document.querySelector('#iterations-table summary').click()")
    page.wait_for(
        f"document.querySelectorAll('#iterations-table tbody tr').length === {min(num, 20)}"
    )
    assert page.complaints == []


def test_the_chat_box_shows_what_was_promised_and_kept(
    page: BrowserPage, busy: RunningServer
) -> None:
    visit(page, busy)
    page.evaluate("document.getElementById('promise').value = 'patient'")
    page.evaluate("document.getElementById('most').value = 5")
    page.evaluate("document.getElementById('send').click()")
    kept = answer_of(page)
    assert kept.startswith("Kept: patient, promised, ")
    assert "First token" in kept
    assert "of 900 s" in kept
    assert text(page, ".turn .answer")
    assert text(page, "#chat-status").startswith("Kept.")
    # A second turn has the first one in its messages; its promise cannot be kept.
    for name, value in (("promise", "own"), ("prompt", "And then?"), ("own-ttft", "1")):
        page.evaluate(f"document.getElementById('{name}').value = '{value}'")
    page.evaluate("document.getElementById('promise').dispatchEvent(new Event('change'))")
    assert page.evaluate("!document.getElementById('own').hidden")
    page.evaluate("document.getElementById('send').click()")
    assert "First token" in answer_of(page)
    assert page.evaluate("document.querySelectorAll('.turn').length") == 2
    # A refusal of the server is told in its words.
    for name, value in (("prompt", "again"), ("most", "100000")):
        page.evaluate(f"document.getElementById('{name}').value = '{value}'")
    page.evaluate("document.getElementById('send').click()")
    assert "maximum context length" in answer_of(page)


def test_a_chat_can_be_stopped(page: BrowserPage, busy: RunningServer) -> None:
    visit(page, busy)
    # The engine hangs after a few tokens, so that the output does not end before.
    with hanging(busy, after=4) as go_on:
        page.evaluate("document.getElementById('most').value = 400")
        page.evaluate("document.getElementById('send').click()")
        page.wait_for("document.querySelector('.turn .answer').textContent")
        page.evaluate("document.getElementById('stop').click()")
        assert answer_of(page).startswith("Stopped. First token after ")
        go_on.set()
    busy.wait_until_free()
    assert busy.engine.stats().finished[FinishReason.ABORT] == 1


def test_it_asks_for_the_key_and_keeps_it_in_the_tab(
    page: BrowserPage, start_server: Callable[..., RunningServer], tiny_llama_dir: Path
) -> None:
    config = ServerConfig(served_model_name="hidden-name", api_key=("secret",))
    server = start_server(tiny_llama_dir, config)
    page.complaints.clear()
    page.go(f"{server.url}/")
    page.wait_for("!document.getElementById('key-form').hidden")
    assert page.evaluate("document.getElementById('live').hidden")
    assert "hidden-name" not in page.evaluate("document.body.innerText")
    for key in ("wrong", "日本", "secret"):
        page.evaluate("document.getElementById('key').focus()")
        page.type(key)
        page.press("Enter", "\r")
        if key != "secret":
            page.wait_for("document.getElementById('key-problem').textContent")
            page.wait_for("document.getElementById('key').value === ''")
    page.wait_for(LIVE)
    assert page.wait_for("document.getElementById('serves').textContent.includes('hidden-name')")
    page.evaluate("document.getElementById('send').click()")
    assert "First token" in answer_of(page)
    # The tab remembers it, and forgets it when asked to.
    page.go(f"{server.url}/?again")
    page.wait_for(LIVE)
    assert page.evaluate("document.cookie + localStorage.length") == "0"
    page.evaluate("document.querySelector('#forget button').click()")
    page.wait_for("!document.getElementById('key-form').hidden")
    # A browser itself notes each refusal in its console.
    assert [one for one in page.complaints if "401" not in one] == []


def test_it_connects_again_by_itself(page: BrowserPage, busy: RunningServer) -> None:
    visit(page, busy)
    busy.loop.call_soon_threadsafe(
        lambda: [one.force_close() for one in busy.runner.connections.connections]
    )
    page.wait_for("document.getElementById('connection').classList.contains('lost')")
    page.wait_for(LIVE)
    page.wait_for("document.querySelectorAll('#lanes code').length === 4")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(
    page: BrowserPage, busy: RunningServer, dark: bool
) -> None:
    visit(page, busy)
    page.look(360, 740, dark=dark)
    page.wait_for("document.querySelectorAll('#lanes svg path').length")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate(FAINT) == []
    page.look(1280, 900)


def test_it_can_be_used_by_keyboard_and_screen_reader(
    page: BrowserPage, busy: RunningServer
) -> None:
    visit(page, busy)
    reached = []
    page.evaluate("document.body.focus()")
    for _ in range(30):
        page.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.id || document.activeElement.textContent.trim(),"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline != "none", name
        reached.append(name)
        if "/openapi.json" in name:
            break
    for name in ("Skip to the content", "prompt", "promise", "most", "send", "clear", "span"):
        assert name in reached, name
    assert reached.index("prompt") < reached.index("send") < reached.index("span")
    assert page.evaluate(UNNAMED) == []
    tags = ("header", "main", "h1")
    assert (
        page.evaluate(f"{list(tags)}.map(tag => document.querySelectorAll(tag).length)") == [1] * 3
    )
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size ==="
        " document.querySelectorAll('[id]').length"
    )
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    # What changes several times a second is not read out.
    assert page.evaluate(
        "[...document.querySelectorAll('[aria-live],[role=status],[role=alert]')].map(e => e.id)"
    ) == ["connection", "key-problem", "chat-status"]


def test_without_scripts_it_says_what_it_always_said(
    page: BrowserPage, busy: RunningServer
) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.call("Page.navigate", url=f"{busy.url}/?plain")
        page.wait_for("location.search === '?plain' && document.readyState === 'complete'")
        root = page.evaluate("document.body.innerText")
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
    for part in ("It serves tiny.", "curl http", "/openapi.json", "needs JavaScript"):
        assert part in root


# Controls and pictures that have no name for a screen reader.
UNNAMED = """
[...document.querySelectorAll('input,select,textarea,button,a,svg[role=img],section,[tabindex="0"]')].filter((one) =>
  !(one.labels?.length || one.textContent.trim() && !one.matches('svg,section,[tabindex]')
    || one.getAttribute('aria-label') || document.getElementById(one.getAttribute('aria-labelledby'))?.textContent)
).map((one) => one.outerHTML.slice(0, 100))
"""

# Texts whose contrast to what is behind them is below 4.5, by WCAG's formula.
FAINT = """
(() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((one) => one / 255)
      .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('body *')].filter((one) => one.checkVisibility() && !one.disabled
    && [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())).map((one) => {
      const style = getComputedStyle(one);
      const [dim, bright] = [light(one.closest('svg') ? style.fill : style.color), light(behind(one))].sort((a, b) => a - b);
      return [one.outerHTML.slice(0, 80), (bright + 0.05) / (dim + 0.05)];
    }).filter(([, contrast]) => contrast < 4.5);
})()
"""
