"""The page itself: its sections, its scripts, and what a browser is told to refuse.

The page needs nothing from outside, and its content security policy lets it load nothing: the two scripts that may run
are named by their hashes, so that even a fault in the escaping would not run what a run's directory says.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from eggroll._optional import require
from eggroll.errors import ConfigError
from eggroll.run.files import explained, write_atomic
from eggroll.run.report import facts
from eggroll.run.report.answers import answers, compared_answers
from eggroll.run.report.plots import Plot, plots, plots_json
from eggroll.run.report.text import escape, in_script
from eggroll.run.report.view import RunView
from eggroll.run.run_dir import RunDir

REPORT = "report.html"
MAX_COMPARED = 8
"""Runs on one page: more colors cannot be told apart."""


def write_report(
    run: RunDir,
    *,
    load_line: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
) -> Path:
    """Write ``report.html``: plots, samples before and after, settings, how to load and to replay.

    Args:
        run: the run; it may be going on, or have no finished generation yet.
        load_line: Python that loads the result, or the command that uses it, shown as it is.
        defaults: the settings of such a run that nobody gave, by name; the others are marked.
        output: another file to write to; ``None`` is ``report.html`` in the run's directory.

    Returns:
        The path of the report.

    Raises:
        MissingExtraError: plotly is not installed.
        RunWriteError: the report cannot be written.
    """
    page = report_page(RunView(run, run.path.resolve().name, defaults, load_line))
    return run.write_file(REPORT, page) if output is None else _write(output, page)


def write_comparison(views: Sequence[RunView], output: str | Path) -> Path:
    """Write one page about several runs: the same plots with all of them, and the settings in which they differ.

    Args:
        views: the runs.
        output: the file.

    Raises:
        ConfigError: there are more runs than colors.
        MissingExtraError: plotly is not installed.
        RunWriteError: the page cannot be written.
    """
    if len(views) > MAX_COMPARED:
        raise ConfigError(f"a page compares at most {MAX_COMPARED} runs, and {len(views)} were given; leave some out")
    return _write(output, comparison_page(views))


def _write(output: str | Path, page: bytes) -> Path:
    path = Path(output)
    with explained(path):
        write_atomic(path, page)
    return path


def report_page(view: RunView) -> bytes:
    """The page about one run."""
    found = plots([view])
    episode = facts.animation(view)
    body = [
        _head(f"eggroll run {view.name}", facts.subtitle(view)),
        facts.note(view),
        f'<div class="cards">{facts.cards(view)}</div>',
        "<h2>Curves</h2>",
        _axis([view]),
        _grid([plot for plot in found if plot.main], found, "main")
        or '<p class="dim">No generation is finished yet.</p>',
        episode,
        "" if view.steps and not view.run.samples() else f"<h2>{_title(view)}</h2>{answers(view)}",
        f"<h2>Use the result</h2>{facts.kept(view)}{facts.load(view)}",
        "<p>Rebuild the weights of any generation from the first ones and <code>updates.jsonl</code>:</p>",
        f"<pre>{escape(facts.replay(view))}</pre>",
        "<h2>More curves</h2>" if any(not plot.main for plot in found) else "",
        _grid([plot for plot in found if not plot.main], found, ""),
        f"<h2>How it was made</h2><pre>{escape(facts.command(view))}</pre>",
        facts.chosen(view),
        facts.settings_table(view),
        f"<details><summary>Environment</summary>{facts.environment_table(view)}</details>",
    ]
    return _page(f"eggroll run {view.name}", "".join(body), found)


def _title(view: RunView) -> str:
    return "Text over time" if 'class="texts"' in answers(view) else "Before and after"


def comparison_page(views: Sequence[RunView]) -> bytes:
    """The page about several runs."""
    found = plots(views)
    title = f"eggroll: {len(views)} runs"
    uses = "".join(f"<h3>{escape(view.name)}</h3>{facts.load(view)}" for view in views)
    made = "".join(f"<h3>{escape(view.name)}</h3><pre>{escape(facts.command(view))}</pre>" for view in views)
    body = [
        _head(title, ", ".join(view.name for view in views)),
        facts.overview(views),
        "<h2>Curves</h2>",
        _axis(views),
        _grid([plot for plot in found if plot.main], found, "main")
        or '<p class="dim">No generation is finished yet.</p>',
        f"<h2>Settings that differ</h2>{facts.differences(views)}",
        f"<h2>Answers</h2>{compared_answers(views)}" if any(view.run.samples() for view in views) else "",
        "<h2>More curves</h2>" if any(not plot.main for plot in found) else "",
        _grid([plot for plot in found if not plot.main], found, ""),
        f"<h2>Use the results</h2>{uses}",
        f"<h2>How they were made</h2>{made}",
    ]
    return _page(title, "".join(body), found)


def _head(title: str, subtitle: str) -> str:
    return f'<h1>{escape(title)}</h1><div class="dim">{escape(subtitle)}</div>'


def _axis(views: Sequence[RunView]) -> str:
    """The buttons that choose what the plots are drawn over."""
    places = [("generation", "over generations"), ("time", "over time")]
    steps = any(view.steps for view in views)
    if steps:
        places.append(("steps", "over environment steps"))
    # generations of different algorithms are not the same thing
    marks = {"steps" if steps and len(views) > 1 else "generation": ' class="on"'}
    buttons = "".join(
        f'<button type="button" data-axis="{key}"{marks.get(key, "")}>{text}</button>' for key, text in places
    )
    return f'<div class="choice" id="axes" hidden>{buttons}</div>'


def _grid(some: Sequence[Plot], every: Sequence[Plot], kind: str) -> str:
    figures = (
        f'<figure><figcaption>{escape(plot.title)}</figcaption><div class="plot" data-plot="{every.index(plot)}"></div>'
        f"{f'<p>{escape(plot.note)}</p>' if plot.note else ''}</figure>"
        for plot in some
    )
    return f'<div class="curves {kind}">{"".join(figures)}</div>' if some else ""


def _page(title: str, body: str, found: Sequence[Plot]) -> bytes:
    packed, digest = _plotly()
    script = _template("report.js")
    values = {
        "title": escape(title),
        "policy": "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; base-uri 'none'; form-action "
        f"'none'; script-src '{_digest(script)}' '{digest}'",
        "style": _template("report.css"),
        "body": body,
        "plots": in_script(plots_json(found)),
        "plotly": packed,
        "script": script,
    }
    return Template(_template("report.html")).substitute(values).encode("utf-8", "replace")


def _template(name: str) -> str:
    return resources.files("eggroll.run").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _plotly() -> tuple[str, str]:
    """plotly's script, compressed and in base64 (2 MB in the place of 5), and the hash of what it is unpacked."""
    script: str = require("plotly.offline", extra="report").get_plotlyjs()
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode(), _digest(script)


def _digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
