"""The page in headless Chromium: it is whole, its figures are drawn, its controls work, and model output stays text."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from backtrack_jax.analysis.registry import ANALYSES
from backtrack_jax.analysis.results import Results
from backtrack_jax.report import page
from backtrack_jax.report.stage import REPORT, all_plots, read_results

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = (
    'Wait </script><script>window.hit = 1</script> hmm <img src=x onerror="window.hit = 2"> waiting <b>&amp; "\' \u2028'
)
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync", "disable-dev-shm-usage")
PATIENCE = 240_000  # milliseconds; a busy machine takes its time over the 4.6 MB of plotly


@pytest.fixture(scope="module")
def hostile(tiny_run: Path) -> tuple[Results, str]:
    """The tiny results in which problems and replies attack the page, and the page made from them."""
    e = tiny.get_config()
    e.name = "tiny <i onclick=1>"
    r = read_results(tiny.get_config(), tiny_run / "results" / "tiny")
    projections = json.loads(json.dumps(r.projections))
    for shown in projections.values():
        for trace in shown["traces"]:
            trace["problem"] = trace["category"] = ATTACK
            trace["tokens"][3] = ATTACK
    replies = [dataclasses.replace(reply, text=ATTACK, problem=ATTACK) for reply in r.replies]
    r = dataclasses.replace(
        r, experiment=e, projections=projections, replies=replies, annotations=r.annotations + ATTACK
    )
    return r, page.render(r, all_plots(r), ANALYSES)


def test_agreement_of_the_judges_is_on_the_page(hostile: tuple[Results, str]) -> None:
    r, text = hostile
    assert r.tables["agreement"]
    for row in r.tables["agreement"]:
        assert f"<td>traces</td><td>{row['group']}</td><td>{row['n_units']}</td><td>{row['n_reference']}</td>" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, and none is installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS], timeout=PATIENCE
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser: Any, hostile: tuple[Results, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page on a phone in the dark, with what it complained of and asked the network for."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(hostile[1], "utf-8")
    REPORT.mark_stale(path.parent, "")
    tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    tab.set_default_timeout(PATIENCE)
    tab.complaints, tab.requests = [], []
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.goto(path.as_uri(), timeout=PATIENCE)
    return tab


def test_the_page_is_one_file_that_asks_for_nothing(hostile: tuple[Results, str]) -> None:
    markup = re.sub(r"<script\b.*?</script>", "", hostile[1], flags=re.DOTALL)  # plotly names servers it may use
    assert not re.search(r"""<[^>]*\b(src|srcset|action)\s*=|@import|url\(""", markup)
    assert re.findall(r'href="(?!#)([^"]+)"', markup) == ["data:,", "https://arxiv.org/abs/2507.12638"]


def test_every_figure_is_drawn_and_nothing_is_complained_of(opened: Any, hostile: tuple[Results, str]) -> None:
    names = [plot.name for plot in all_plots(hostile[0])]
    assert len(names) == 13
    for name in names:
        opened.locator(f"#figure-{name} .plot").scroll_into_view_if_needed()
        opened.wait_for_selector(f"#figure-{name} .plot.js-plotly-plot .main-svg", state="attached")
        drawn = opened.evaluate(
            "name => document.querySelectorAll(`#figure-${name} .trace, #figure-${name} .hm`).length", name
        )
        assert drawn > 0, name
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("reason", [None, "", "made from results of 3-vectors that have been replaced"])
def test_a_page_that_is_out_of_date_says_so(
    browser: Any, hostile: tuple[Results, str], tmp_path: Path, reason: str | None
) -> None:
    """By the file beside it, which a later run changes without touching the page; alone it says nothing."""
    (tmp_path / "report.html").write_text(hostile[1], "utf-8")
    if reason is not None:
        REPORT.mark_stale(tmp_path, reason)
    tab = browser.new_page(viewport={"width": 900, "height": 500})
    tab.goto((tmp_path / "report.html").as_uri(), timeout=PATIENCE)
    stale = tab.locator("#stale")
    assert stale.is_visible() is bool(reason)
    assert stale.text_content() == (f"Out of date: {reason}." if reason else "")
    tab.close()


def test_a_phone_need_not_scroll_sideways(opened: Any) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390


def test_model_output_does_nothing(opened: Any) -> None:
    assert opened.evaluate("window.hit === undefined")
    assert opened.locator("img").count() == 0
    assert opened.locator("#reply-left-text").evaluate("e => e.textContent") == ATTACK
    assert ATTACK in opened.locator("#trace-tokens").evaluate("e => e.textContent")
    assert opened.locator("#trace-problem").evaluate("e => e.textContent") == f"Problem: {ATTACK}"
    marked = opened.locator("#reply-left-text mark").all_text_contents()
    assert marked == ["Wait", "hmm"]  # and not `waiting`
    assert opened.locator("h1").text_content() == "tiny <i onclick=1>"


def test_the_trace_viewer_shows_what_is_chosen(opened: Any, hostile: tuple[Results, str]) -> None:
    shown = hostile[0].projections["base"]
    opened.select_option("#trace-role", label="base model")
    opened.select_option("#trace-id", "2")
    opened.select_option("#trace-layer", label="2")
    opened.select_option("#trace-vector", label="deduction, reasoning-derived")
    trace = shown["traces"][2]
    assert opened.locator("#trace-tokens span").all_text_contents() == trace["tokens"]
    layer = shown["layers"].index(2)
    vector = shown["vectors"].index({"source": "reasoning", "label": "deduction"})
    opened.locator("#trace-tokens span").nth(4).click()
    told = opened.locator("#trace-hover").text_content()
    assert f"token 4 {json.dumps(trace['tokens'][4])}: projection {trace['values'][layer][vector][4]:.2f}" in told
    starts = {at for label, at in trace["starts"] if label == "backtracking"}
    read = {at + k for at in starts for k in range(-5, -1)}
    has = "name => [...document.querySelectorAll('#trace-tokens span')].map(s => s.classList.contains(name))"
    assert {i for i, on in enumerate(opened.evaluate(has, "start")) if on} == starts
    assert {i for i, on in enumerate(opened.evaluate(has, "read")) if on} == {i for i in read if i >= 0}
    shade = "i => document.querySelectorAll('#trace-tokens span')[i].style.background"
    values = trace["values"][layer][vector]
    for i in (values.index(max(values)), values.index(min(values))):
        assert opened.evaluate(shade, i).startswith("rgba(214" if values[i] > 0 else "rgba(40")


def test_replies_and_theme_follow_the_controls(opened: Any) -> None:
    names = opened.locator("#reply-left option").all_text_contents()
    assert len(names) == 40 and "base model + 8 x deduction, reasoning-derived" in names
    for side, number in (("left", 3), ("right", 17)):
        before = opened.locator(f"#reply-{side}-numbers").text_content()
        opened.select_option(f"#reply-{side}", str(number))
        after = opened.locator(f"#reply-{side}-numbers").text_content()
        assert "wait or hmm, log-likelihood" in after and after != before
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = opened.evaluate(ground)
    opened.click("#theme")
    assert (dark, opened.evaluate(ground)) == ("rgb(22, 24, 27)", "rgb(255, 255, 255)")
    assert opened.complaints == []


def test_json_in_the_page_is_inert() -> None:
    text = page.inert_json({"a": "</script><!--\u2028&", "b": [1.5, None]})
    assert "<" not in text and "&" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--\u2028&", "b": [1.5, None]}
    with pytest.raises(ValueError):
        page.inert_json(float("nan"))  # not JSON
