"""Open questions about evolution strategies, answered at fixed cost on one small problem: next letters of a text.

    python benchmarks/science/questions.py --data tinyshakespeare.txt --folder /tmp/science      three hours on one core

The problem: the next of 65 letters from the last eight. Embedding (65 x 16), LayerNorm, 128 to 64, ReLU, 64 to 65: 14
thousand parameters. A member's score is its mean log-likelihood on 128 places, the same ones for all members of a
generation. Every run spends the same number of members' evaluations, whatever its population is.

Fairness: each variant gets its own learning rate, the best of a grid (extended where the best is at its end) by bits
per letter on the ninth tenth of the text with a seed that is not used again; Adam's rate falls linearly to 0. Then
three seeds, measured on the last tenth. sigma was chosen once, for the first variant, in the same way. Runs that are
done are kept in the folder, one line each, so that the table can be made in several sittings.
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
from eggroll.run.provenance import git_revision, versions
from eggroll.torch import Active, Replica

CONTEXT, PLACES, MEASURED = 8, 128, 20_000
BUDGET, SMALL = 262_144, 32_768
"""Members' evaluations of a run, and of the shorter ones of the last question."""
RATES, SIGMAS = (0.001, 0.003, 0.01, 0.03, 0.1), (0.02, 0.05, 0.1, 0.2)
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
    "Do embeddings and vectors pay?": {
        "all parameters": {},
        "without vectors": {"parts": "no vectors"},
        "without the embedding": {"parts": "no embedding"},
        "matrices only": {"parts": "matrices"},
    },
    "May generations share their noise?": {f"{k} in turn": {"noise_reuse": k} for k in (1, 4, 16)},
    f"Which population, at {BUDGET:,} evaluations?": {f"{n} members": {"population_size": n} for n in POPULATIONS},
    f"Which population, at {SMALL:,} evaluations?": {
        f"{n} members": {"population_size": n, "budget": SMALL} for n in POPULATIONS
    },
}
PARTS: dict[str, dict[str, Any]] = {
    "all": {"kinds": KINDS},
    "no vectors": {"kinds": ("matrix", "embedding")},
    "no embedding": {"kinds": ("matrix", "vector")},
    "matrices": {"kinds": ("matrix",)},
}


class Letters(nn.Module):
    """The next letter from ``(rows, 8)`` letters: ``(rows, 65)`` logits."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(letters, 16), nn.LayerNorm(16 * CONTEXT)
        self.hidden, self.out = nn.Linear(16 * CONTEXT, 64), nn.Linear(64, letters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.norm(self.embedding(ids).flatten(-2)))))


class Text:
    """A text as numbers: eight tenths to train on, one to choose by, one to measure on."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        letters = sorted(set(text))
        self.ids = torch.tensor([letters.index(letter) for letter in text])
        self.letters, tenth = len(letters), len(text) // 10
        self.ranges = {"train": (0, 8 * tenth), "choose": (8 * tenth, 9 * tenth), "measure": (9 * tenth, 10 * tenth)}

    def batch(self, part: str, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``(size, 8)`` letters and the ``(size,)`` ones that follow."""
        low, high = self.ranges[part]
        draw = torch.Generator().manual_seed(seed)
        places = torch.randint(low, high - CONTEXT - 1, (size, 1), generator=draw) + torch.arange(CONTEXT + 1)
        window = self.ids[places]
        return window[:, :-1], window[:, -1]


def likelihood(logits: Tensor, following: Tensor) -> Tensor:
    """Mean log-likelihood in bits: logits ``(..., rows, 65)``, letters ``(rows,)``."""
    found = torch.log_softmax(logits.float(), -1).gather(-1, following.expand(logits.shape[:-1]).unsqueeze(-1))
    return found.squeeze(-1).mean(-1) / math.log(2)


@torch.no_grad()
def evolve(text: Text, settings: dict[str, Any], sigma: float, lr: float, seed: int) -> nn.Module:
    """The model after a run."""
    rest = dict(settings)
    parts, budget = PARTS[rest.pop("parts")], rest.pop("budget")
    generations = budget // rest["population_size"]
    torch.manual_seed(seed)
    model = Letters(text.letters).eval()
    config = ESConfig(
        sigma=sigma, lr=lr, lr_schedule="linear", generations=generations, optimizer="adam", seed=seed, **rest
    )
    replica = Replica(model, config, kinds=parts["kinds"])
    for generation in range(generations):
        ids, following = text.batch("train", PLACES, seed * 1_000_003 + generation)

        def score(module: nn.Module, active: Active) -> Tensor:
            return likelihood(active.split(module(active.expand(ids))), following)  # noqa: B023

        replica.step(score, members_per_forward=min(256, config.population_size))
    return model


def descend(text: Text, lr: float, seed: int, steps: int) -> nn.Module:
    """The model after as many batches of Adam by gradients, for comparison."""
    torch.manual_seed(seed)
    model = Letters(text.letters)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        ids, following = text.batch("train", PLACES, seed * 1_000_003 + step)
        optimizer.zero_grad()
        (-likelihood(model(ids), following)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class Book:
    """Runs that are done: bits per letter by what was run, kept in a file."""

    def __init__(self, path: Path, text: Text) -> None:
        self.path, self.text = path, text
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {line["key"]: line for line in map(json.loads, lines)}

    @torch.no_grad()
    def bits(self, settings: dict[str, Any], sigma: float, lr: float, seed: int) -> float:
        """Of a run, on the part that its seed is for."""
        key = json.dumps([settings, sigma, lr, seed], sort_keys=True)
        if key not in self.known:
            started = time.perf_counter()
            if "steps" in settings:
                with torch.enable_grad():
                    model = descend(self.text, lr, seed, settings["steps"])
            else:
                model = evolve(self.text, settings, sigma, lr, seed)
            seconds = time.perf_counter() - started
            part = "choose" if seed == TUNING else "measure"
            ids, following = self.text.batch(part, MEASURED, 7)
            found = -float(likelihood(model(ids), following))
            self.known[key] = {"key": key, "bits": found, "seconds": round(seconds, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.known[key]) + "\n")
            print(f"{found:.3f}  {seconds:5.1f} s  {key}", flush=True)
        return float(self.known[key]["bits"])

    def rate(self, settings: dict[str, Any], sigma: float) -> float:
        """The best learning rate; the grid grows while the best is at its end."""
        tried = {lr: self.bits(settings, sigma, lr, TUNING) for lr in GRID}
        while True:
            best = min(tried, key=lambda lr: tried[lr])
            at = RATES.index(best)
            more = [lr for lr in RATES[max(0, at - 1) : at + 2] if lr not in tried]
            if not more:
                return best
            tried.update({lr: self.bits(settings, sigma, lr, TUNING) for lr in more})


def table(answers: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown: a table for each question."""
    parts = []
    for question, rows in answers.items():
        parts.append(f"**{question}**\n\n| | bits per letter, mean of 3 seeds (min to max) | lr |\n|---|---:|---:|")
        for row in rows:
            low, high = min(row["bits"]), max(row["bits"])
            parts.append(f"| {row['variant']} | {row['mean']:.3f} ({low:.3f} to {high:.3f}) | {row['lr']:g} |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the text")
    parser.add_argument("--folder", type=Path, required=True, help="where runs that are done are written down")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="does it run? no result file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    book = Book(given.folder / "runs.jsonl", Text(given.data))
    if given.quick:
        print(book.bits({**BASE, "population_size": 8, "budget": 16}, SIGMAS[0], GRID[0], 0))
        return
    sigmas = {sigma: min(book.bits(BASE, sigma, lr, TUNING) for lr in GRID) for sigma in SIGMAS}
    sigma = min(sigmas, key=lambda each: sigmas[each])
    answers: dict[str, list[dict[str, Any]]] = {}
    questions = {
        **QUESTIONS,
        "By gradients, with as many batches": {"Adam": {"steps": BUDGET // BASE["population_size"]}},
    }
    for question, variants in questions.items():
        for variant, changes in variants.items():
            settings = changes if "steps" in changes else {**BASE, **changes}
            lr = book.rate(settings, sigma)
            bits = [book.bits(settings, sigma, lr, seed) for seed in SEEDS]
            row = {
                "variant": variant,
                "lr": lr,
                "bits": [round(each, 4) for each in bits],
                "mean": statistics.mean(bits),
            }
            answers.setdefault(question, []).append(row)
    today = datetime.date.today().isoformat()
    content = {
        "what": "science", "hardware": hardware(), "threads": given.threads, "date": today,
        "revision": git_revision(ROOT), "versions": versions(), "sigma": sigma, "sigmas": sigmas, "budget": BUDGET,
        "answers": answers,
    }  # fmt: skip
    path = RESULTS / "science" / f"questions_{slug(hardware())}_{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(answers))
    print(table(answers), path, sep="\n")


if __name__ == "__main__":
    main()
