"""The report in a real browser: no error, nothing loaded, curves drawn, nothing beyond the edge of a phone."""

from __future__ import annotations

import base64
import time

import pytest
from browser import Browser, find

from eggroll.run import RunDir
from eggroll.run.report import write_comparison, write_report
from eggroll.run.report.view import RunView

PROGRAM = find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium-headless-shell")
GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
EVIL = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'>"
LOOKS = {"desktop": {"width": 1180}, "dark": {"width": 1180, "dark": True}, "phone": {"width": 390, "touch": True}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(PROGRAM, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def made(path, **config):
    """A run of eight generations, with everything that a page can show and names that nobody should choose."""
    run = RunDir.create(path, {"generations": 8, "options": {"env": EVIL, "population_size": 8, **config}})
    run.append_metrics({"generation": 0, "event": "start", "heldout_reward": 0.1})
    for number in range(1, 9):
        run.append_metrics(
            {
                **{"generation": number, "fitness_mean": number / 9, "fitness_min": 0.0, "fitness_max": 1.0},
                **{
                    "fitness_std": 0.1 * number,
                    "heldout_reward": number / 10,
                    "update_norm": 1.0,
                    "elapsed_s": number * 30,
                },
                **{"update_cosine": 0.1, "memory_bytes": 2**30, "members_per_s": 3.0, EVIL: 1.5},
                **{"elapsed_s": number * 30, "scores": 16, "invalid_scores": number % 2},
                **{"env_steps": 100.0 * number},
            }
        )
    for generation, reward in ((0, 0.0), (8, 1.0)):
        text = "a very_long_word_" * 20
        row = {"generation": generation, "member": -1, "split": "heldout", "completion": text + EVIL, "reward": reward}
        run.append_samples([{**row, "prompt": f"{number} {EVIL}", "logged": {EVIL: reward}} for number in range(12)])
    (run.path / "episode.gif").write_bytes(GIF)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = made(tmp_path_factory.mktemp("runs") / "an_unreasonably_long_name_of_a_run_that_no_phone_has_room_for")
    return write_report(run, load_line="load('a/rather/long/path/to/the/model')" * 3, defaults={"population_size": 4})


def check(browser, path, plots):
    assert int(browser.open(path)) == plots
    assert browser.errors == []
    assert [url[:5] for url in browser.requests if not url.startswith(("data:", "blob:"))] == ["file:"]
    assert browser.value("window.evil") is None
    curves = "[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('path.js-line, .points path').length)"
    assert all(browser.value(curves))
    assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("look", LOOKS)
def test_a_run(browser, page, look):
    browser.look(**LOOKS[look])
    check(browser, page, 9)
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (look != "dark")
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    assert browser.value(ink) == ("rgb(154, 165, 182)" if look == "dark" else "rgb(91, 101, 119)")


def test_the_axis_and_the_kinds_can_be_chosen(browser, page):
    browser.look(1180)
    browser.open(page)
    title = "document.querySelector('.plot .xtitle').textContent"
    assert browser.value(title) == "generation"
    browser.value("document.querySelector('[data-axis=time]').click()")
    assert browser.value(f"new Promise(done => setTimeout(() => done({title}), 200))") == "minutes"
    points = "document.querySelector('.plot').data[0].x.at(-1)"
    assert browser.value(points) == 4.0
    browser.value("document.querySelector('[data-axis=steps]').click()")
    assert browser.value(f"new Promise(done => setTimeout(() => done({points}), 200))") == 800
    shown = "[...document.querySelectorAll('.answers article')].filter(a => a.checkVisibility()).length"
    assert browser.value(shown) == 6
    browser.value("document.querySelector('#others summary').click()")
    assert browser.value(shown) == 12


def test_a_theme_that_changes_is_followed(browser, page):
    browser.look(1180)
    browser.open(page)
    browser.look(1180, dark=True)
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    assert browser.value(f"new Promise(done => setTimeout(() => done({ink}), 400))") == "rgb(154, 165, 182)"


@pytest.mark.parametrize("look", LOOKS)
def test_several_runs(browser, tmp_path, look):
    views = [RunView(made(tmp_path / name, sigma=number), name + EVIL) for number, name in enumerate("abc")]
    path = write_comparison(views, tmp_path / "three.html")
    browser.look(**LOOKS[look])
    check(browser, path, 9)
    names = "[...document.querySelectorAll('.plot')[0].querySelectorAll('.legendtext')].map(t => t.textContent)"
    assert [name[:8] for name in browser.value(names)] == ["a</scrip", "b</scrip", "c</scrip"]


def test_it_can_be_read_without_scripts(browser, page):
    browser.look(1180)
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.send("Page.navigate", url=page.resolve().as_uri())
        text, end = "", time.monotonic() + 20
        while "The curves need JavaScript" not in text and time.monotonic() < end:
            time.sleep(0.1)
            text = browser.value("document.body?.innerText") or ""
        assert "The curves need JavaScript" in text
        assert "very_long_word_" in text
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
