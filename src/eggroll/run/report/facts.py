"""The cards, tables and notes of a page: how a run went, its settings, and where it was made."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from eggroll._command import typed
from eggroll.errors import RunError
from eggroll.run.console import duration, number, rate
from eggroll.run.files import read_plain
from eggroll.run.keeping import kept_sentence
from eggroll.run.report.plots import failed_shares
from eggroll.run.report.text import escape
from eggroll.run.report.view import PPO, REWARD, RunView

EPISODES = ("episode.gif", "episode.html")
LARGEST_PICTURE = 12 * 2**20
"""Bytes of an animation that a page holds."""


def subtitle(view: RunView) -> str:
    """What evolved, when, and on what, in one line."""
    about = view.run.environment
    hardware = about.get("gpus") or [about.get("cpu")]
    facts = [view.kind, view.model, view.task, about.get("started_utc"), *hardware]
    return ", ".join(dict.fromkeys(str(fact) for fact in facts if fact))


def note(view: RunView) -> str:
    """Why a run has fewer generations than it was to have; empty if it has not."""
    if view.total is None or view.finished >= view.total:
        return ""
    ended = view.result.get("generations") == view.finished and not view.result.get("interrupted")
    if ended and view.result.get("stopped_early"):
        text = (
            f"The run was stopped early after {view.finished} of {view.total} generations: its last evaluations on "
            "held-out data did not beat the best score. Continue it with --resume and a larger --patience."
        )
    elif ended:
        minutes = view.run.setting("minutes")
        spent = isinstance(minutes, int | float)
        why = f"its {minutes:g} minutes were used up" if spent else "its goal was reached, or its budget used up"
        text = f"The run ended after {view.finished} of {view.total} generations: {why}."
        text += " Continue it with --resume and more --minutes." if spent else ""
    else:
        text = f"The run is not finished: {view.finished} of {view.total} generations. Continue it with --resume."
    return f'<div class="note">{escape(text)}</div>'


def cards(view: RunView) -> str:
    """The figures at the top."""

    def card(value: str, label: str, style: str = "") -> str:
        return f'<div class="card"><b class="{style}">{escape(value)}</b><span>{escape(label)}</span></div>'

    finished, measure = view.finished, view.measure
    found = [card(f"{finished:,} of {view.total:,}" if view.total is not None else f"{finished:,}", "generations")]
    lines, heldout = view.points(measure.key)
    if heldout:
        found.append(card(_way(heldout), f"{measure.short}, first → last", _style(view, heldout)))
        best = measure.best(heldout)
        saved = ", saved" if lines[best]["generation"] == view.kept else ""
        found.append(
            card(number(heldout[best]), f"best {measure.short}, after generation {lines[best]['generation']:,}{saved}")
        )
    fitness = view.values("fitness_mean")
    if fitness:
        found.append(card(_way(fitness), "mean fitness, first → last"))
    size = view.run.setting("population_size")
    if size is not None:
        found.append(card(str(size), f"members, rank {view.run.setting('rank', '?')}"))
    for key, word in (("members_per_s", "members per second, mean"), ("tokens_per_s", "tokens per second, mean")):
        speed = view.values(key)
        if speed:
            found.append(card(rate(sum(speed) / len(speed)), word))
    for key, word in (("gpu_memory_bytes", "memory on the GPU, most"), ("memory_bytes", "memory, most")):
        if view.values(key):
            found.append(card(f"{max(view.values(key)) / 2**30:.1f} GiB", word))
    shares = [share for _, share in failed_shares(view)]
    if shares:
        mean = sum(shares) / len(shares)
        found.append(card(f"{100 * mean:.2g} %" if mean else "none", "scores that failed", "down" if mean else ""))
    if view.values("elapsed_s"):
        found.append(card(duration(view.seconds), "time"))
    return "".join(found)


def _way(values: Sequence[float]) -> str:
    return f"{number(values[0])} → {number(values[-1])}"


def _style(view: RunView, heldout: Sequence[float]) -> str:
    gain = (heldout[-1] - heldout[0]) * (1 if view.measure.higher else -1)
    return "up" if gain > 0 else "down" if gain < 0 else ""


def load(view: RunView) -> str:
    """How the result is loaded."""
    if view.load_line is not None:
        what = "Use it" if view.load_line.startswith(("eggroll ", f"{typed()} ")) else "Load it"
        return f"<p>{what}:</p><pre>{escape(view.load_line)}</pre>"
    text = f"No model was saved. The weights after {view.finished} generations can be rebuilt as shown here"
    if view.run.checkpoints.exists():
        text += f", and the last checkpoints are in {view.run.checkpoints}"
    return f"<p>{escape(text)}.</p>"


def kept(view: RunView) -> str:
    """Which generation's weights the run has saved, with the scores of the best and of the last one."""
    text = "" if view.kept is None else kept_sentence(view.result, view.metrics)
    return f"<p>{escape(text)}.</p>" if text else ""


def replay(view: RunView) -> str:
    """The command that rebuilds the weights."""
    return f"eggroll replay {shlex.quote(str(view.run.path))} --to {view.finished}"


def command(view: RunView) -> str:
    """The command that started the run."""
    return shlex.join(str(word) for word in view.run.environment.get("command", [])) or "not recorded"


def animation(view: RunView) -> str:
    """An episode of the policy, or why there is none; empty for runs that have no episodes."""
    if not view.steps and view.kind not in ("rl", PPO):
        return ""
    picture, page = (view.run.path / name for name in EPISODES)
    try:
        data = read_plain(picture) if picture.exists() and picture.stat().st_size <= LARGEST_PICTURE else b""
    except (OSError, RunError):
        data = b""
    if data[:6] in (b"GIF87a", b"GIF89a"):
        shown = base64.b64encode(data).decode()
        image = f'<img class="episode" alt="an episode of the policy" src="data:image/gif;base64,{shown}">'
        return f"<h2>The policy</h2>{image}"
    if picture.exists():
        text = f"{picture} is no animation that can be shown here."
    elif page.exists():
        text = f"Its viewer is a page of its own: {page}"
    else:
        text = (
            "There is no animation: the environment cannot draw itself, or the run has not ended, or was started with "
            "--no-render."
        )
    return f'<h2>The policy</h2><p class="dim">{escape(text)}</p>'


def settings_table(view: RunView) -> str:
    """All settings; those that are not the defaults come first and are marked."""
    settings, changed = view.settings(), view.changed()
    rest = {key: value for key, value in settings.items() if not changed or key not in changed}
    if changed is None or view.defaults is None:
        return f"<details open><summary>Settings</summary>{_facts(rest)}</details>"
    rows = "".join(
        f'<tr class="changed"><td>{escape(str(key))}</td><td>{escape(value)}</td>'
        f"<td>{escape(view.defaults[key])}</td></tr>"
        for key, value in changed.items()
    )
    head = "<tr><th>not the default</th><th>value</th><th>default</th></tr>"
    table = f'<table class="facts three">{head}{rows}</table>' if changed else ""
    return f"{table}<details><summary>{len(rest)} other settings</summary>{_facts(rest)}</details>"


def _facts(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{escape(str(key))}</td><td>{escape(value)}</td></tr>" for key, value in values.items())
    return f'<table class="facts">{"".join(rows)}</table>'


def chosen(view: RunView) -> str:
    """What ``auto`` chose and why, with what members scored at each sigma; empty where nothing was chosen."""
    found = view.run.environment.get("chosen")
    if not isinstance(found, Mapping):
        return ""
    lines = [line for line in found.get("lines") or () if isinstance(line, str)]
    levels = [level for level in found.get("levels") or () if isinstance(level, Mapping)]
    columns = {"sigma": "sigma", "mean": "members score", "deviation": "spread", "noise": "noise between prompts"}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    rows = "".join(f"<tr>{''.join(f'<td>{_cell(level.get(key))}</td>' for key in columns)}</tr>" for level in levels)
    table = f'<table class="facts">{"<tr>" + head + "</tr>"}{rows}</table>' if levels else ""
    told = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h3>Chosen before the run</h3><ul>{told}</ul>{table}" if lines or levels else ""


def _cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number else escape(value)


def environment_table(view: RunView) -> str:
    """Versions, hardware and sources."""
    found: dict[str, Any] = {}
    for key, value in view.run.environment.items():
        if key == "packages" and isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        if key not in ("command", "chosen"):
            found[str(key)] = value
    return _facts(found)


def overview(views: Sequence[RunView]) -> str:
    """A table of several runs."""
    heads = ("", "run", "what", "generations", f"{_measure_of(views)}, first → last", "best", "time")
    rows = []
    for index, view in enumerate(views):
        lines, heldout = view.points(view.measure.key)
        best = view.measure.best(heldout) if heldout else 0
        total = "" if view.total is None else f" of {view.total:,}"
        cells = (
            f'<i class="key c{index}"></i>',
            f"<b>{escape(view.name)}</b>",
            escape(", ".join(dict.fromkeys(part for part in (view.kind, view.model, view.task) if part))),
            f"{view.finished:,}{total}",
            f'<b class="{_style(view, heldout)}">{_way(heldout)}</b>' if heldout else "",
            f"{number(heldout[best])} at {lines[best]['generation']:,}" if heldout else "",
            duration(view.seconds),
        )
        labels = zip(heads, cells, strict=True)
        rows.append("<tr>" + "".join(f'<td data-label="{escape(head)}">{cell}</td>' for head, cell in labels) + "</tr>")
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    return f'<table class="overview"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _measure_of(views: Sequence[RunView]) -> str:
    names = {view.measure.short for view in views}
    return names.pop() if len(names) == 1 else REWARD.short


def differences(views: Sequence[RunView]) -> str:
    """The settings in which runs differ, side by side; those that only some kinds of runs have can be unfolded."""
    tables = [view.settings() for view in views]
    common: list[str] = []
    others: list[str] = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [table[key] for table in tables if key in table]
        if key in ("output", "resume") or (len(values) == len(tables) and all(value == values[0] for value in values)):
            continue
        cells = "".join(f"<td>{escape(table[key]) if key in table else ''}</td>" for table in tables)
        (common if len(values) == len(tables) else others).append(f"<tr><td>{escape(str(key))}</td>{cells}</tr>")

    def table_of(rows: Sequence[str]) -> str:
        head = "".join(f"<th>{escape(view.name)}</th>" for view in views)
        return f'<div class="wide"><table class="facts"><tr><th>setting</th>{head}</tr>{"".join(rows)}</table></div>'

    found = table_of(common) if common else '<p class="dim">What all of them have is the same.</p>'
    folded = f"<details><summary>{len(others)} settings that only some have</summary>{table_of(others)}</details>"
    return found + (folded if others else "")
