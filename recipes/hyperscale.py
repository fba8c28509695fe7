"""hyperscale: how large a population can be before memory ends, EGGROLL beside full-rank evolution strategies.

    eggroll recipe hyperscale [--memory-gib 8] [--rank 1]

Populations are doubled until they need more than ``--memory-gib``, each evaluated in a process of its own whose largest
resident memory is measured: one generation (draw, evaluate, update) of a perceptron 784-256-256-10 on 16 images. Three
ways: full-rank noise stored for every member; EGGROLL with the factors of all members in memory and evaluated at once;
EGGROLL evaluated in parts whose factors are drawn by address when they are needed, and again for the update.

Expected (--memory-gib 1 --seconds 15): 512 members with full-rank noise, 16,384 with EGGROLL's factors in memory, and
524,288 in parts, which take 0.22 GiB and 26 s a generation: there time is the limit, on two cores (AMD EPYC).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eggroll._optional import require
from eggroll.core.check import numbers, whole
from eggroll.core.settings import setting
from eggroll.errors import ConfigError
from eggroll.recipes.common import console, program

SIZES = {"layer1.weight": (256, 784), "layer2.weight": (256, 256), "layer3.weight": (10, 256)}
BATCH = 16
WAYS = {
    "full rank": "full-rank noise of all members",
    "at once": "EGGROLL, all members at once",
    "in parts": "EGGROLL, in parts of 512 members",
}
FIRST, LAST = 2**8, 2**22


@dataclass(frozen=True, kw_only=True)
class HyperscaleOptions:
    """Largest population and memory."""

    memory_gib: float | None = None
    """Memory that a generation may take; half of what is free by default."""
    rank: int = 1
    """Rank of the perturbations."""
    seconds: float = 120.0
    """A generation that takes longer ends a curve, too."""
    device: str = "cpu"
    """cpu or cuda."""
    output: str | None = setting(None, flags=("-o",))
    """Run directory (default: runs/hyperscale-TIME)."""

    def __post_init__(self) -> None:
        given = {} if self.memory_gib is None else {"memory_gib": (0.0, False)}
        problems = [*whole(self, rank=1), *numbers(self, seconds=(0.0, False), **given)]
        if problems:
            raise ConfigError.from_problems(type(self).__name__, problems)


OPTIONS = HyperscaleOptions


def run(options: HyperscaleOptions) -> dict[str, Any]:
    """Double the population until memory ends, for each way of keeping noise; writes a table, a curve and JSON."""
    free = require("psutil", extra="recipes").virtual_memory().available / 2**30
    if torch.device(options.device).type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {options.device}: there is no CUDA device here; use cpu")
        free = torch.cuda.mem_get_info()[0] / 2**30
    limit = options.memory_gib or free / 2
    if limit > free:
        raise ConfigError(f"--memory-gib {limit:g}: only {free:.1f} GiB are free")
    path = Path(options.output or f"runs/hyperscale-{time.strftime('%Y%m%d-%H%M%S')}")
    path.mkdir(parents=True, exist_ok=True)
    console.print(f"memory for a generation: {limit:.1f} GiB; a process of its own for every measurement\n")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in WAYS:
        population = FIRST
        while population <= LAST:
            measured = _measure(way, population, options, limit)
            if measured is None:
                console.print(f"{WAYS[way]:34} {population:>9,} members: beyond {limit:.1f} GiB")
                break
            found[way].append(measured)
            taken = f"{measured['gib']:6.2f} GiB, {measured['generation_s']:7.2f} s"
            console.print(f"{WAYS[way]:34} {population:>9,} members: {taken}")
            if measured["generation_s"] > options.seconds:
                console.print(f"{'':34} a generation takes more than {options.seconds:g} s, so this curve ends here")
                break
            population *= 2
    result = {
        "limit_gib": limit,
        "rank": options.rank,
        "device": options.device,
        "largest_population": {way: int(rows[-1]["population"]) if rows else 0 for way, rows in found.items()},
        "curves": found,
    }
    (path / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _show(found, limit, path)
    return result


def _measure(way: str, population: int, options: HyperscaleOptions, limit: float) -> dict[str, float] | None:
    """One generation in a process of its own; ``None`` if it needs more memory than ``limit`` GiB."""
    at_least = _stored_bytes(way, population, options.rank) / 2**30
    if at_least > limit:
        return None  # the noise alone would not fit
    arguments = [way, str(population), str(options.rank), options.device]
    done = subprocess.run([sys.executable, "-m", __name__ if __name__ != "__main__" else "eggroll.recipes.hyperscale",
                           "--child", *arguments], capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode != 0:
        if "OutOfMemoryError" in done.stderr or "not enough memory" in done.stderr or done.returncode == -9:
            return None
        raise RuntimeError(f"the measurement of {population} members failed:\n{done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return None if measured["gib"] > limit else measured


def _stored_bytes(way: str, population: int, rank: int) -> int:
    """Bytes of the noise that is in memory at once."""
    if way == "in parts":
        return 0
    each = sum(m * n if way == "full rank" else (m + n) * rank for m, n in SIZES.values())
    return 4 * population * each


def _generation_of(way: str, population: int, rank: int, device: str) -> Callable[[], None]:
    """One generation as a function without arguments."""
    from eggroll.torch import functional as f

    torch.manual_seed(0)
    params = {key: torch.randn(shape, device=device) / shape[1] ** 0.5 for key, shape in SIZES.items()}
    x, labels = torch.randn(BATCH, 784, device=device), torch.randint(10, (BATCH,), device=device)

    def score(logits: Tensor) -> Tensor:
        chosen = torch.log_softmax(logits, -1).gather(-1, labels.view(1, -1, 1).expand(len(logits), -1, 1))
        return chosen.mean((1, 2))

    def factored(perts: f.Perturbations) -> Tensor:
        h = x.unsqueeze(0)
        for key in SIZES:
            h = f.perturbed_forward(h, params[key], None, perts, key)
            h = h if key == "layer3.weight" else torch.relu(h)
        return score(h)

    def at_once() -> None:
        perts = f.generate_perturbations(
            f.get_weight_shapes(params), population, rank, 0.02, f.NoiseKey(0), device=device
        )
        f.update_params(params, f.compute_gradients(f.normalize_fitnesses(factored(perts)), perts), 0.01)

    def full_rank() -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        noise = {k: torch.randn((population, *s), device=device, generator=generator) for k, s in SIZES.items()}
        h = x.expand(population, -1, -1)
        for key in SIZES:
            h = torch.baddbmm((h @ params[key].T), h, noise[key].transpose(1, 2), alpha=0.02)
            h = h if key == "layer3.weight" else torch.relu(h)
        weights = f.normalize_fitnesses(score(h))
        for key in SIZES:
            params[key] += 0.01 / population**0.5 * torch.einsum("p,pmn->mn", weights, noise[key])

    if way == "full rank":
        return full_rank
    return at_once if way == "at once" else _in_parts(params, x, score, population, rank)


def _in_parts(
    params: dict[str, Tensor], x: Tensor, score: Callable[[Tensor], Tensor], population: int, rank: int
) -> Callable[[], None]:
    """Members in parts; nothing of the noise is kept."""
    from eggroll.core.config import ESConfig
    from eggroll.core.fitness import shape_fitness
    from eggroll.core.records import UpdateRecord
    from eggroll.torch import Replica

    layers = [torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in params.values()]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]).eval().to(x.device)
    replica = Replica(model, ESConfig(population_size=population, rank=rank, sigma=0.02, lr=0.01))
    replica.population.noise.cache_bytes = 0

    def generation() -> None:
        scores = replica.population.scores(
            lambda active: score(active.split(model(active.expand(x)))), 0, members_per_forward=512
        )
        weights = shape_fitness(scores.double().cpu().numpy())
        replica.apply(UpdateRecord.make(0, 0.02, 0.01, weights))

    return generation


def _child(way: str, population: int, rank: int, device: str) -> None:
    """What a measuring process does: its memory before, one generation, its largest memory."""
    with torch.no_grad():
        _generation_of(way, 8, rank, device)()  # libraries and buffers that every size needs
        generation = _generation_of(way, population, rank, device)
        cuda = torch.device(device).type == "cuda"
        before = _largest_resident()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        generation()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = _largest_resident() - before
        if cuda:
            peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"population": population, "gib": max(peak, 0) / 2**30, "generation_s": seconds}))


def _largest_resident() -> int:
    """Bytes. Linux keeps it in ``VmHWM``; ``ru_maxrss`` there starts at what the parent process had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _show(found: dict[str, list[dict[str, float]]], limit: float, path: Path) -> None:
    table = Table(title=f"largest population within {limit:.1f} GiB", title_justify="left")
    for column in ("", "members", "GiB", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for way, rows in found.items():
        if rows:
            last = rows[-1]
            table.add_row(
                WAYS[way], f"{int(last['population']):,}", f"{last['gib']:.2f}", f"{last['generation_s']:.2f}"
            )
    console.print(table)
    matplotlib = require("matplotlib", extra="recipes")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="recipes")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for way, rows in found.items():
        axes.plot([r["population"] for r in rows], [r["gib"] for r in rows], marker="o", label=WAYS[way])
    axes.axhline(limit, color="grey", linestyle="--", linewidth=1, label="memory that may be used")
    axes.set(xscale="log", yscale="log", xlabel="members", ylabel="memory of a generation, GiB")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path / "memory.png", dpi=150)
    console.print(f"\ncurve    {path / 'memory.png'}\nnumbers  {path / 'result.json'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        program("hyperscale")
