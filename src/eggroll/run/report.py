"""``report.html``: one self-contained page about a run, finished or not."""

from __future__ import annotations

import html
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from eggroll.run.console import duration, number, rate
from eggroll.run.curves import BITS, Curve, Measure, curves, heldout_measure
from eggroll.run.metrics import series
from eggroll.run.run_dir import RunDir

REPORT, RESULT = "report.html", "result.json"
MAX_ROWS = 30
MAX_CHARACTERS = 4000
CENTER = -1
"""``member`` of a sample that the center made, not a member of the population."""

Sample = Mapping[str, Any]


def write_report(run: RunDir, *, load_line: str | None = None) -> Path:
    """Write ``report.html`` into the run's directory: curves, samples before and after, how to load and to replay.

    Args:
        run: the run; it may be going on, or have no finished generation yet.
        load_line: Python that loads the result, or the command that uses it, shown as it is.

    Returns:
        The path of the report.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunWriteError: the report cannot be written.
    """
    metrics = run.metrics()
    drawn, measure = curves(metrics), heldout_measure(metrics)
    finished = len(run.updates())
    total = run.setting("generations")
    values = {
        "title": _escape(f"eggroll run {run.path.resolve().name}"),
        "subtitle": _escape(_subtitle(run)),
        "note": _note(run, finished, total),
        "cards": "".join(_cards(run, metrics, finished, total, measure)),
        "main_curves": _grid([curve for curve in drawn if curve.main], "main")
        or '<p class="dim">No generation is finished yet.</p>',
        "other_curves": _grid([curve for curve in drawn if not curve.main], ""),
        "samples": _samples(run.samples(), measure),
        "load": _load(run, load_line, finished),
        "replay": _escape(f"eggroll replay {shlex.quote(str(run.path))} --to {finished}"),
        "command": _escape(shlex.join(str(word) for word in run.environment.get("command", [])) or "not recorded"),
        "config": _facts(_flat(run.config)),
        "environment": _facts({key: value for key, value in run.environment.items() if key != "command"}),
    }
    template = resources.files("eggroll.run").joinpath("templates", REPORT).read_text(encoding="utf-8")
    page = Template(template).substitute(values)
    return run.write_file(REPORT, page.encode("utf-8", "replace"))


def _escape(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _subtitle(run: RunDir) -> str:
    facts = [run.environment.get("model") or run.setting("model"), run.environment.get("started_utc")]
    hardware = run.environment.get("gpus") or [run.environment.get("cpu")]
    return ", ".join(str(fact) for fact in [*facts, *hardware] if fact)


def _note(run: RunDir, finished: int, total: Any) -> str:
    if not isinstance(total, int) or finished >= total:
        return ""
    if _ended_after(run) == finished:
        minutes = run.setting("minutes")
        spent = isinstance(minutes, int | float)
        why = f"its {minutes:g} minutes were used up" if spent else "its goal was reached, or its budget used up"
        text = f"The run ended after {finished} of {total} generations: {why}."
        text += " Continue it with --resume and more --minutes." if spent else ""
    else:
        text = f"The run is not finished: {finished} of {total} generations. Continue it with --resume."
    return f'<div class="note">{_escape(text)}</div>'


def _ended_after(run: RunDir) -> Any:
    """The generation at which the run was ended and measured, before its last one or there."""
    try:
        return json.loads((run.path / RESULT).read_bytes())["generations"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _cards(run: RunDir, metrics: Sequence[Sample], finished: int, total: Any, measure: Measure) -> list[str]:
    def card(value: str, label: str, style: str = "") -> str:
        return f'<div class="card"><b class="{style}">{_escape(value)}</b><span>{_escape(label)}</span></div>'

    cards = [card(f"{finished} of {total}" if isinstance(total, int) else str(finished), "generations")]
    where, heldout = series(metrics, measure.key)
    if heldout:
        gain = (heldout[-1] - heldout[0]) * (1 if measure.higher else -1)
        style = "up" if gain > 0 else "down" if gain < 0 else ""
        cards.append(card(f"{number(heldout[0])} → {number(heldout[-1])}", f"{measure.short}, first → last", style))
        best = (max if measure.higher else min)(range(len(heldout)), key=heldout.__getitem__)
        cards.append(card(number(heldout[best]), f"best {measure.short}, after generation {where[best]}"))
    _, fitness = series(metrics, "fitness_mean")
    if fitness:
        cards.append(card(f"{number(fitness[0])} → {number(fitness[-1])}", "mean fitness, first → last"))
    size = run.setting("population_size")
    if size is not None:
        cards.append(card(str(size), f"members, rank {run.setting('rank', '?')}"))
    _, speed = series(metrics, "members_per_s")
    if speed:
        cards.append(card(rate(sum(speed) / len(speed)), "members per second, mean"))
    _, elapsed = series(metrics, "elapsed_s")
    if elapsed:
        cards.append(card(duration(_total(elapsed)), "time"))
    return cards


def _total(elapsed: Sequence[float]) -> float:
    """Seconds over all sessions: ``elapsed_s`` starts at 0 again when a run is resumed."""
    ends = [now for now, after in itertools.pairwise(elapsed) if after < now]
    return sum(ends) + elapsed[-1]


def _grid(drawn: Sequence[Curve], kind: str) -> str:
    figures = (f'<figure role="img" aria-label="{_escape(curve.title)}">{curve.svg}</figure>' for curve in drawn)
    return f'<div class="curves {kind}">{"".join(figures)}</div>' if drawn else ""


@dataclass(frozen=True)
class Comparison:
    """What the model made of one prompt in the first and in the last generation with samples of it."""

    prompt: Any
    before: Sample
    after: Sample | None


def before_and_after(samples: Sequence[Sample]) -> list[Comparison]:
    """The first and the last sample of each prompt: the center's on held-out prompts, else its others, else members'.

    ``after`` is ``None`` where a prompt was sampled in one generation only.
    """
    groups = (
        [s for s in samples if s.get("member") == CENTER and s.get("split") == "heldout"],
        [s for s in samples if s.get("member") == CENTER],
        list(samples),
    )
    chosen = next((group for group in groups if group), [])
    by_prompt: dict[str, list[Sample]] = {}
    for sample in chosen:
        by_prompt.setdefault(json.dumps(sample.get("prompt")), []).append(sample)
    found = []
    for same in by_prompt.values():
        first = min(same, key=lambda sample: sample["generation"])
        last = max(same, key=lambda sample: sample["generation"])
        later = last if last["generation"] > first["generation"] else None
        found.append(Comparison(first.get("prompt"), first, later))
    return sorted(found, key=lambda comparison: comparison.after is None)  # stable: compared prompts first


def _samples(samples: Sequence[Sample], measure: Measure) -> str:
    rows = before_and_after(samples)
    if not rows:
        return '<p class="dim">No samples were logged.</p>'
    parts = []
    for row in rows[:MAX_ROWS]:
        after = _sample(row.after, measure) if row.after else '<span class="dim">not sampled again yet</span>'
        prompt = f'<div class="text">{_cut(_prompt(row.prompt))}</div>'
        parts.append(f"<tr><td>{prompt}</td><td>{_sample(row.before, measure)}</td><td>{after}</td></tr>")
    more = f'<p class="dim">{MAX_ROWS} of {len(rows)} prompts; all are in samples.jsonl.</p>'
    head = "<tr><th>prompt</th><th>before</th><th>after</th></tr>"
    return f'<table class="samples">{head}{"".join(parts)}</table>{more if len(rows) > MAX_ROWS else ""}'


def _prompt(prompt: Any) -> str:
    """A prompt as text; of a conversation, each message with its role."""
    if isinstance(prompt, list) and all(isinstance(message, Mapping) for message in prompt):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _sample(sample: Sample, measure: Measure) -> str:
    reward = sample.get("reward")
    sign = 1 if measure.higher else -1
    shown = number(sign * reward) if isinstance(reward, int | float) else "none"
    word = f"{shown} {measure.short}" if measure is BITS else f"reward {shown}"
    line = f"{word}, generation {sample['generation']}"
    return f'<div class="text">{_cut(_prompt(sample.get("completion")))}</div><div class="reward">{_escape(line)}</div>'


def _cut(text: str) -> str:
    return _escape(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …")


def _load(run: RunDir, load_line: str | None, finished: int) -> str:
    if load_line is not None:
        what = "Use it" if load_line.startswith("eggroll ") else "Load it"
        return f"<p>{what}:</p><pre>{_escape(load_line)}</pre>"
    text = f"No model was saved. The weights after {finished} generations can be rebuilt as shown here"
    if run.checkpoints.exists():
        text += f", and the last checkpoints are in {run.checkpoints}"
    return f"<p>{_escape(text)}.</p>"


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run in one table; the algorithm's own come last."""
    parts = {key: value for key, value in config.items() if key not in ("options", "config")}
    options, algorithm = config.get("options") or {}, config.get("config") or {}
    return {**parts, **options, **algorithm}


def _facts(values: Mapping[str, Any]) -> str:
    return "".join(f"<tr><td>{_escape(str(key))}</td><td>{_escape(value)}</td></tr>" for key, value in values.items())
