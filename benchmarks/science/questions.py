"""Open questions about evolution strategies, answered at fixed cost on one small problem: the digits of MNIST.

    python benchmarks/science/questions.py --folder runs/science                 all runs, one thread
    python benchmarks/science/questions.py --folder runs/science --write         the same, and writes the result

The problem: which of ten digits. 784 to 32, LayerNorm, ReLU, 32 to 10: 26 thousand parameters. A member's score is its
mean log-likelihood on 64 images, the same ones for all members of a generation. Every run spends the same number of
members' evaluations, whatever its population is.

Fairness: each variant gets its own learning rate, the best of a grid (extended where the best is at its end) by
cross-entropy on 5,000 images that are not trained on, with a seed that is not used again; Adam's rate falls linearly
to 0. Then three seeds, measured on the test set. sigma was chosen once, for the first variant, in the same way. Runs
that are done are kept in the folder, one line each, so that the table can be made in several sittings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, ROOT, hardware, slug

from eggroll.core.config import ESConfig
from eggroll.core.select import KINDS
from eggroll.recipes.images import Images, load
from eggroll.run.provenance import git_revision, versions
from eggroll.torch import Active, Replica

BATCH = 64
BUDGET, SMALL = 262_144, 32_768
"""Members' evaluations of a run, and of the shorter ones of the last question."""
RATES, SIGMAS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), (0.005, 0.02, 0.05, 0.1)
GRID = (0.003, 0.01, 0.03)
TUNING, SEEDS = 100, (0, 1, 2)
BASE: dict[str, Any] = {"population_size": 256, "rank": 1, "parts": "all", "budget": BUDGET}
POPULATIONS = (16, 64, 256, 1024, 4096)
QUESTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "Does the rank matter?": {f"rank {r}": {"rank": r} for r in (1, 4, 16, 64)},
    "Antithetic pairs or one-sided draws?": {"pairs": {}, "one-sided, leave one out": {"sampling": "one_sided"}},
    "How are scores shaped?": {
        "centered ranks": {},
        "z-scores": {"fitness_shaping": "normalized"},
        "raw": {"fitness_shaping": "raw"},
    },
    "Do vectors (biases and norms) pay?": {"all parameters": {}, "matrices only": {"parts": "matrices"}},
    "May generations share their noise?": {"1 in turn": {}, **{f"{k} in turn": {"noise_reuse": k} for k in (4, 16)}},
    f"Which population, at {BUDGET:,} evaluations?": {f"{n} members": {"population_size": n} for n in POPULATIONS},
    f"Which population, at {SMALL:,} evaluations?": {
        f"{n} members": {"population_size": n, "budget": SMALL} for n in POPULATIONS
    },
}
PARTS: dict[str, dict[str, Any]] = {"all": {"kinds": KINDS}, "matrices": {"kinds": ("matrix",)}}


class Digits(nn.Module):
    """Which digit: images ``(rows, 28, 28)`` to ``(rows, 10)`` logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(784, 32), nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.hidden(images.flatten(-2)))))


def likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean log-likelihood in bits: logits ``(..., rows, 10)``, labels ``(rows,)``."""
    found = torch.log_softmax(logits.float(), -1).gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1))
    return found.squeeze(-1).mean(-1) / math.log(2)


@torch.no_grad()
def evolve(data: Images, settings: dict[str, Any], sigma: float, lr: float, seed: int) -> nn.Module:
    """The model after a run."""
    rest = dict(settings)
    parts, budget = PARTS[rest.pop("parts")], rest.pop("budget")
    generations = budget // rest["population_size"]
    torch.manual_seed(seed)
    model = Digits().eval()
    config = ESConfig(
        sigma=sigma, lr=lr, lr_schedule="linear", generations=generations, optimizer="adam", seed=seed, **rest
    )
    replica = Replica(model, config, kinds=parts["kinds"])
    for generation in range(generations):
        images, labels = data.minibatch(BATCH, seed, generation)

        def score(module: nn.Module, active: Active) -> Tensor:
            return likelihood(active.split(module(active.expand(images))), labels)  # noqa: B023

        replica.step(score, members_per_forward=min(256, config.population_size))
    return model


def descend(data: Images, lr: float, seed: int, steps: int) -> nn.Module:
    """The model after as many batches of Adam by gradients, for comparison."""
    torch.manual_seed(seed)
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        images, labels = data.minibatch(BATCH, seed, step)
        optimizer.zero_grad()
        (-likelihood(model(images), labels)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Book:
    """Runs that are done: what each measured, by what was run, kept in a file that several processes may write to."""

    def __init__(self, path: Path, data: Images) -> None:
        self.path, self.data = path, data
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {line["key"]: line for line in map(json.loads, lines)}

    @torch.no_grad()
    def run(self, settings: dict[str, Any], sigma: float, lr: float, seed: int) -> dict[str, float]:
        """Of a run, on the images that its seed is for: cross-entropy in ``bits`` and the part that is ``right``."""
        key = json.dumps([settings, sigma, lr, seed], sort_keys=True)
        if key not in self.known:
            started = time.perf_counter()
            if "steps" in settings:
                with torch.enable_grad():
                    model = descend(self.data, lr, seed, settings["steps"])
            else:
                model = evolve(self.data, settings, sigma, lr, seed)
            seconds = time.perf_counter() - started
            images, labels = self.data.validation if seed == TUNING else self.data.test
            logits = model(images)
            right = float((logits.argmax(-1) == labels).float().mean())
            line = {"key": key, "bits": -float(likelihood(logits, labels)), "right": right}
            self.known[key] = {**line, "seconds": round(seconds, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
            print(f"{line['bits']:.4f}  {100 * right:.2f} %  {seconds:5.1f} s  {key}", flush=True)
        return {name: float(self.known[key][name]) for name in ("bits", "right")}

    def rate(self, settings: dict[str, Any], sigma: float) -> float:
        """The best learning rate; the grid grows while the best is at its end."""
        tried = {lr: self.run(settings, sigma, lr, TUNING)["bits"] for lr in GRID}
        while True:
            best = min(tried, key=lambda lr: tried[lr])
            at = RATES.index(best)
            more = [lr for lr in RATES[max(0, at - 1) : at + 2] if lr not in tried]
            if not more:
                return best
            tried.update({lr: self.run(settings, sigma, lr, TUNING)["bits"] for lr in more})

    def sigma(self) -> tuple[float, dict[float, float]]:
        """The best sigma for the first variant, and what each one reached with its best rate."""
        found = {sigma: min(self.run(BASE, sigma, lr, TUNING)["bits"] for lr in GRID) for sigma in SIGMAS}
        return min(found, key=lambda each: found[each]), found

    def answer(self, variants: dict[str, dict[str, Any]], sigma: float) -> list[dict[str, Any]]:
        """A row for each variant: its rate, and what three seeds reached with it."""
        rows = []
        for variant, changes in variants.items():
            settings = changes if "steps" in changes else {**BASE, **changes}
            lr = self.rate(settings, sigma)
            runs = [self.run(settings, sigma, lr, seed) for seed in SEEDS]
            kept = {name: [round(run[name], 5) for run in runs] for name in ("bits", "right")}
            rows.append({"variant": variant, "lr": lr, **kept})
        return rows


def table(answers: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown: a table for each question."""
    parts = []
    for question, rows in answers.items():
        parts.append(
            f"**{question}**\n\n| | cross-entropy in bits, mean of 3 seeds (min to max) | right, % | lr |\n"
            "|---|---:|---:|---:|"
        )
        for row in rows:
            bits, right = row["bits"], [100 * part for part in row["right"]]
            parts.append(
                f"| {row['variant']} | {statistics.mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f}) "
                f"| {statistics.mean(right):.1f} ({min(right):.1f} to {max(right):.1f}) | {row['lr']:g} |"
            )
        parts.append("")
    return "\n".join(parts)


def draw(answers: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each question: its variants from the top, each seed a dot, the mean a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {question: rows for question, rows in answers.items() if len(rows) > 1}
    figure, panels = pyplot.subplots(-(-len(shown) // 2), 2, figsize=(12, 1.9 * len(shown)), squeeze=False)
    for axes, (question, rows) in zip(panels.flat, shown.items(), strict=False):
        places = range(len(rows))
        axes.barh(places, [statistics.mean(row["bits"]) for row in rows], color="C0", alpha=0.4)
        for place, row in zip(places, rows, strict=True):
            axes.plot(row["bits"], [place] * len(row["bits"]), "o", color="C0", markersize=4)
        axes.set_yticks(places, [row["variant"] for row in rows])
        axes.invert_yaxis()
        axes.set_title(question, fontsize=10)
        axes.set_xlabel("cross-entropy on the test set, bits (less is better)", fontsize=8)
        axes.grid(alpha=0.3, axis="x")
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with MNIST's files (default: as eggroll recipe mnist finds them)")
    parser.add_argument("--folder", type=Path, required=True, help="where runs that are done are written down")
    parser.add_argument("--questions", type=int, nargs="+", help="numbers of the questions, from 1 (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the result, its table and its picture")
    parser.add_argument("--quick", action="store_true", help="does it run? no result file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    data = load(given.data, torch.device("cpu"))
    book = Book(given.folder / "runs.jsonl", data)
    if given.quick:
        print(book.run({**BASE, "population_size": 8, "budget": 16}, SIGMAS[0], GRID[0], 0))
        return
    sigma, sigmas = book.sigma()
    questions = {
        **QUESTIONS,
        "By gradients, with as many batches": {"Adam": {"steps": BUDGET // BASE["population_size"]}},
    }
    chosen = [list(questions)[number - 1] for number in given.questions or range(1, len(questions) + 1)]
    answers = {question: book.answer(questions[question], sigma) for question in chosen}
    print(table(answers))
    if given.write:
        today = datetime.date.today().isoformat()
        content = {
            "what": "science", "hardware": hardware(), "threads": given.threads, "date": today, "data": data.name,
            "revision": git_revision(ROOT), "versions": versions(), "sigma": sigma, "sigmas": sigmas, "budget": BUDGET,
            "answers": answers,
        }  # fmt: skip
        path = RESULTS / "science" / f"questions_{slug(hardware())}_{today}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(answers))
        draw(answers, path.with_suffix(".png"))
        print(path)


if __name__ == "__main__":
    main()
