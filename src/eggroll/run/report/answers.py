"""What the model wrote before and after, sorted by what changed most, with the rewards and their parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eggroll.run.console import number
from eggroll.run.report.text import conversation, cut, escape
from eggroll.run.report.view import BITS, Measure, RunView

MAX_ROWS = 30
FIRST_ROWS = 6
"""Prompts that are open when the page is; the others can be unfolded."""
MAX_TEXTS = 40
MAX_RUNS = 4
"""Runs whose answers stand side by side, at most."""
CENTER = -1
"""``member`` of a sample that the center made, not a member of the population."""

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What the model made of one prompt in the first and in the last generation with samples of it."""

    prompt: Any
    before: Sample
    after: Sample | None

    @property
    def change(self) -> float | None:
        """How much the reward has changed; ``None`` where one of the two has none."""
        if self.after is None:
            return None
        before, after = reward_of(self.before), reward_of(self.after)
        return None if before is None or after is None else after - before

    @property
    def key(self) -> str:
        """The prompt as one word, to find it in another run."""
        return json.dumps(self.prompt)


def reward_of(sample: Sample) -> float | None:
    """A sample's reward, if it is a number of a usual size."""
    found = sample.get("reward")
    usual = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1e300
    return float(found) if usual else None  # type: ignore[arg-type]


def before_and_after(samples: Sequence[Sample]) -> list[Comparison]:
    """The first and the last sample of each prompt: the center's on held-out prompts, else its others, else members'.

    Those whose reward has changed most come first, then those whose text has changed. ``after`` is ``None`` where a
    prompt was sampled in one generation only; these come last.
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
    return sorted(found, key=_order)


def until_kept(view: RunView) -> list[Sample]:
    """The samples of a run up to the generation whose weights it has saved: the last ones are of the saved model."""
    kept = view.kept
    return [sample for sample in view.run.samples() if kept is None or sample["generation"] <= kept]


def _order(row: Comparison) -> tuple[bool, float, bool]:
    return row.after is None, -abs(row.change or 0.0), row.after is not None and _same_text(row.before, row.after)


def _same_text(one: Sample, other: Sample) -> bool:
    return one.get("completion") == other.get("completion")


def answers(view: RunView) -> str:
    """The section of one run."""
    samples = view.run.samples()
    over_time = texts_over_time(samples, view.measure)
    if over_time:
        return over_time
    rows = before_and_after(until_kept(view))
    if not rows:
        return '<p class="dim">No samples were logged.</p>'
    kinds = [_kind(row) for row in rows]
    parts = [_row(row, kind, view.measure) for row, kind in zip(rows[:MAX_ROWS], kinds, strict=False)]
    shown = _filter(kinds[:MAX_ROWS])
    more = f'<p class="dim">{MAX_ROWS} of {len(rows)} prompts; all are in samples.jsonl.</p>'
    return f"{shown}{_folded(parts)}{more if len(rows) > MAX_ROWS else ''}"


def _folded(articles: Sequence[str]) -> str:
    first, rest = articles[:FIRST_ROWS], articles[FIRST_ROWS:]
    others = f'<details id="others"><summary>{len(rest)} more</summary>{"".join(rest)}</details>' if rest else ""
    return f'<div class="answers">{"".join(first)}{others}</div>'


def _kind(row: Comparison) -> str:
    """``better``, ``worse``, ``even`` (another text, the same reward), ``same`` (the same text)."""
    if row.after is None or _same_text(row.before, row.after):
        return "same"
    change = row.change or 0.0
    return "better" if change > 0 else "worse" if change < 0 else "even"


def _filter(kinds: Sequence[str]) -> str:
    words = {"better": "better", "worse": "worse", "even": "other text, same reward", "same": "unchanged"}
    there = {kind: kinds.count(kind) for kind in words if kind in kinds}
    if len(there) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-kind="{kind}">{words[kind]} {count}</button>' for kind, count in there.items()
    )
    return (
        f'<div class="choice" id="kinds" hidden><button type="button" data-kind="" class="on">all {len(kinds)}</button>'
        f"{buttons}</div>"
    )


def _row(row: Comparison, kind: str, measure: Measure) -> str:
    change = row.change if measure is not BITS else None if row.change is None else -row.change
    delta = "" if not change else f'<b class="{kind}">{"+" if change > 0 else "−"}{number(abs(change))}</b>'
    before, after = _answer("before", row.before, measure), _empty("after")
    if row.after is not None:
        after = _answer("after", row.after, measure, row.before)
    head = f'<div class="prompt"><div class="text">{cut(conversation(row.prompt))}</div>{delta}</div>'
    return f'<article class="{kind}">{head}<div class="pair">{before}{after}</div></article>'


def _empty(word: str) -> str:
    return f'<div class="answer"><h3>{word}</h3><span class="dim">not sampled again yet</span></div>'


def _answer(word: str, sample: Sample, measure: Measure, before: Sample | None = None) -> str:
    text = f'<div class="text">{cut(conversation(sample.get("completion")))}</div>'
    return f'<div class="answer"><h3>{escape(word)}</h3>{text}{_reward(sample, measure)}{_parts(sample, before)}</div>'


def _reward(sample: Sample, measure: Measure) -> str:
    line = f"{_score(sample, measure)}, generation {sample['generation']:,}"
    return f'<div class="reward">{escape(line)}</div>'


def _score(sample: Sample, measure: Measure) -> str:
    reward = reward_of(sample)
    shown = "none" if reward is None else number(reward if measure.higher else -reward)
    return f"{shown} {measure.short}" if measure is BITS else f"reward {shown}"


def _parts(sample: Sample, before: Sample | None) -> str:
    """What a reward has logged of an answer: its parts, where it returns them; those that changed are marked."""
    logged, old = sample.get("logged"), (before or {}).get("logged")
    if not isinstance(logged, Mapping) or not logged:
        return ""
    found = []
    for name, value in list(logged.items())[:MAX_ROWS]:
        usual = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        shown = f"{float(value):.3g}" if usual else conversation(value)
        style = ' class="moved"' if isinstance(old, Mapping) and name in old and old[name] != value else ""
        found.append(f"<span{style}>{cut(str(name))} <b>{cut(shown)}</b></span>")
    return f'<div class="parts">{"".join(found)}</div>'


def texts_over_time(samples: Sequence[Sample], measure: Measure) -> str:
    """One prompt, again and again: the text of each generation, the newest first; empty for other samples."""
    own = [sample for sample in samples if sample.get("member") == CENTER]
    if measure is not BITS or len(own) < 2 or len({json.dumps(sample.get("prompt")) for sample in own}) > 1:
        return ""
    step = -(-len(own) // MAX_TEXTS)
    shown = own[::-1][::step]
    asked = conversation(own[0].get("prompt"))
    prompt = f"<p>Prompt: <code>{cut(asked)}</code></p>" if asked else ""
    rows = "".join(
        f"<article><div><b>generation {sample['generation']:,}</b>"
        f'<div class="reward">{_score(sample, measure)}</div></div>'
        f'<div class="text">{cut(conversation(sample.get("completion")))}</div></article>'
        for sample in shown
    )
    more = f'<p class="dim">{len(shown)} of {len(own)} samples; all are in samples.jsonl.</p>'
    return f'{prompt}<div class="texts">{rows}</div>{more if len(shown) < len(own) else ""}'


def compared_answers(views: Sequence[RunView]) -> str:
    """The last answers of several runs to the same prompts, side by side, beside the first run's before training."""
    tables = [{row.key: row for row in before_and_after(until_kept(view))} for view in views[:MAX_RUNS]]
    shared = [key for key in tables[0] if all(key in table for table in tables)] if tables else []
    if not shared:
        return '<p class="dim">The runs have no sampled prompts in common.</p>'

    def spread(key: str) -> float:
        rewards = [reward_of(table[key].after or table[key].before) for table in tables]
        known = [reward for reward in rewards if reward is not None]
        return max(known) - min(known) if len(known) > 1 else 0.0

    shared.sort(key=spread, reverse=True)
    parts = []
    for key in shared[:MAX_ROWS]:
        first = tables[0][key]
        cells = [_answer("before", first.before, views[0].measure)]
        for view, table in zip(views, tables, strict=False):
            after = table[key].after
            cells.append(_empty(view.name) if after is None else _answer(view.name, after, view.measure, first.before))
        head = f'<div class="prompt"><div class="text">{cut(conversation(first.prompt))}</div></div>'
        parts.append(f'<article>{head}<div class="pair">{"".join(cells)}</div></article>')
    more = f'<p class="dim">{MAX_ROWS} of {len(shared)} prompts that all runs have.</p>'
    return f"{_folded(parts)}{more if len(shared) > MAX_ROWS else ''}"
