"""docs/models.md: what the results say, as tables."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
Result = dict[str, Any]
MODES = ("rows", "vmap", "loop")
WORDS = {
    "made": "modules made by hand",
    "torch": "modules of PyTorch",
    "transformers": "architectures of transformers",
    "timm": "models of timm",
}
HEAD = """\
# Models that work

Which modules can be a population, in which [mode](population.md#when-rows-do-not-work), and is every member right?
This page is written by `python scripts/zoo.py`, which runs PyTorch's own collection of modules with its own inputs,
architectures of transformers built from tiny configurations, and models of timm. Nothing is downloaded.

**How a case is checked.** The weights of each member are computed by the float64 oracle (`eggroll.core.oracle`),
copied into a plain copy of the module, and the copies are run one by one. `Population.forward` with `mode="auto"`
must return the same outputs. So must a plain call inside `Population.perturbed` (another batch size, rank, and
number of members), and greedy generation with left padding inside it, for causal language models. Differences are
taken relative to the perturbation's own effect, the distance between the member's outputs and the center's: a
member in the wrong place is off by about 1. Up to {tolerance:g} counts as rounding.

- **right** in `rows`, `vmap` or `loop`: all outputs of all members agree in the mode that `auto` took.
- **refused**: an error of eggroll says why, before anything wrong comes out.
- **wrong** and **crashed**: a fault in eggroll. There should be none.
- **slowdown**: time of the population forward over the time of the plain module with the same rows (the better of a
  few runs, one thread). The models are so tiny that this compares the overhead of operators, not arithmetic; for
  speed at real sizes see [benchmarks.md](benchmarks.md).
- **largest deviation**: of any output of any member, relative to the perturbation's effect.

All of it is run again with `python scripts/zoo.py --again` (about five minutes on two cores; models of timm
where it is installed), a part with `--only PATTERN`; `--list` prints the names of all cases.
"""


def write_page(results: Sequence[Result]) -> str:
    """Write the page; returns a sentence that says so."""
    PAGE.write_text(page(results), encoding="utf-8")
    return f"{len(results)} results are in {PAGE.relative_to(PAGE.parents[1])}"


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    from .check import TOLERANCE

    families: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        families[result["case"].split("/")[0]].append(result)
    parts = [HEAD.format(tolerance=TOLERANCE), "## Summary\n", summary(families)]
    if faults := [r for r in results if overall(r) in ("wrong", "crashed")]:
        parts += ["## Wrong or crashed\n", _faults(faults)]
    if families["transformers"]:
        parts += ["## Architectures of transformers\n", _models(families["transformers"])]
    if families["timm"]:
        parts += ["## Models of timm\n", _models(families["timm"])]
    if families["made"]:
        parts += ["## Modules made by hand\n", MADE_WORDS, _models(families["made"])]
    if families["torch"]:
        parts += ["## Modules of PyTorch\n", TORCH_WORDS, _modules(families["torch"])]
    parts += ["## Refusals\n", REFUSAL_WORDS, _refusals(results)]
    parts += ["## Not in the zoo\n", NONE_WORDS, _left_out(families)]
    return "\n".join(parts).rstrip() + "\n"


MADE_WORDS = """\
What public code does and a population has to see through: `scripts/zoo_cases/made_modules.py`.
"""
TORCH_WORDS = """\
Each module of `torch.testing._internal.common_modules.module_db` with each of its inputs that has a batch, in
evaluation mode. Modules without parameters stand behind a perturbed scale. Cases are counted by result.
"""
REFUSAL_WORDS = """\
What cannot be evaluated in rows, in eggroll's own words. `auto` goes on to `vmap` and `loop` by itself; inside
`Population.perturbed` the sentence is an error. Names and shapes are of one example; the number says how many cases
have the same sentence.
"""
NONE_WORDS = """\
Cases without a plain module to compare with: no batch in their inputs, a missing library, or a configuration that
cannot be made tiny by the rules in `scripts/zoo_cases/`.
"""


def overall(result: Result) -> str:
    """A result in one word."""
    return result.get("overall", result["status"])


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    escaped = ((str(cell).replace("|", "\\|").replace("][", "]\\[") for cell in row) for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped) + "\n"


def summary(families: dict[str, list[Result]]) -> str:
    """One line a collection."""
    lines = []
    for family in WORDS:
        ran = [r for r in families[family] if r["status"] != "no case"]
        if not ran:
            continue
        counts = Counter(r["mode"] if overall(r) == "right" else overall(r) for r in ran)
        in_rows = [r["slowdown"] for r in ran if r.get("mode") == "rows" and "slowdown" in r]
        generation = Counter(_generation(r) for r in ran if "generation" in r)
        lines.append(
            [
                WORDS[family],
                len(ran),
                *(counts[key] for key in (*MODES, "refused", "wrong", "crashed")),
                f"{statistics.median(in_rows):.1f}x" if in_rows else "",
                ", ".join(f"{count} {word}" for word, count in generation.most_common() if word),
            ]
        )
    header = ["", "cases", *MODES, "refused", "wrong", "crashed", "median slowdown in rows", "greedy generation"]
    return _table(header, lines)


def _generation(result: Result) -> str:
    part = result.get("generation")
    if part is None or part["status"] == "none":
        return ""
    return part["mode"] if part["status"] == "right" else part["status"]


def _models(results: Sequence[Result]) -> str:
    lines = []
    for r in sorted(results, key=lambda r: r["case"]):
        if r["status"] == "no case":
            continue
        lines.append(
            [
                r["case"].split("/", 1)[1],
                f"`{r.get('what', '')}`" if r.get("what") else "",
                r["mode"] if overall(r) == "right" else f"**{overall(r)}**",
                _number(r, "slowdown", "{:.1f}x"),
                _deviation(r),
                r.get("block", {}).get("status", ""),
                _generation(r),
            ]
        )
    return _table(
        ["model", "class", "mode", "slowdown", "largest deviation", "inside `perturbed`", "generation"], lines
    )


def _number(result: Result, key: str, form: str) -> str:
    return form.format(result[key]) if key in result else ""


def _deviation(result: Result) -> str:
    found = [
        part["deviation"]
        for part in (result, result.get("block", {}), result.get("generation", {}))
        if "deviation" in part
    ]
    return f"{max(found):.0e}" if found else ""


def _modules(results: Sequence[Result]) -> str:
    groups: dict[str, list[Result]] = defaultdict(list)
    for r in results:
        if r["status"] != "no case":
            groups[r["case"].split("/")[1]].append(r)
    lines = []
    for name, cases in sorted(groups.items()):
        counts = Counter(r["mode"] if overall(r) == "right" else f"**{overall(r)}**" for r in cases)
        blocks = Counter(r.get("block", {}).get("status", "none") for r in cases)
        slow = [r["slowdown"] for r in cases if "slowdown" in r]
        lines.append(
            [
                f"`{name}`",
                ", ".join(f"{count} {word}" for word, count in counts.most_common()),
                f"{statistics.median(slow):.0f}x" if slow else "",
                f"{max(float(_deviation(r) or 0) for r in cases):.0e}",
                ", ".join(f"{count} {word}" for word, count in blocks.most_common()),
            ]
        )
    return _table(["module", "mode", "slowdown", "largest deviation", "inside `perturbed`"], lines)


def _faults(results: Sequence[Result]) -> str:
    lines = []
    for r in results:
        for where, part in (("auto", r), ("perturbed", r.get("block", {})), ("generation", r.get("generation", {}))):
            if part.get("status") in ("wrong", "crashed"):
                lines.append([r["case"], where, part["status"], part.get("sentence", "")[:300]])
    return _table(["case", "where", "result", "what happened"], lines)


def _refusals(results: Sequence[Result]) -> str:
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for r in results:
        for part in (r, r.get("block", {}), r.get("generation", {})):
            if part.get("status") == "refused":
                text = part["sentence"]
                groups[re.sub(r"'[^']*'|\([^)]*\)|\d[\d.e%+-]*", "_", text)].append((r["case"], text))
    lines = []
    for found in sorted(groups.values(), key=lambda found: -len(found)):
        case, text = min(found, key=lambda pair: len(pair[0]))
        lines.append([len({name for name, _ in found}), case, text])
    return _table(["cases", "for example", "sentence"], lines)


def _left_out(families: dict[str, list[Result]]) -> str:
    lines = []
    for r in families["transformers"] + families["timm"]:
        if r["status"] == "no case":
            lines.append([r["case"], r.get("sentence", "")[:160]])
    counts = Counter(r.get("sentence", "") for r in families["torch"] if r["status"] == "no case")
    head = "; ".join(f"{count} of PyTorch's cases: {words}" for words, count in counts.most_common(3))
    return (head + ".\n\n" if head else "") + (_table(["model", "why"], lines) if lines else "")
