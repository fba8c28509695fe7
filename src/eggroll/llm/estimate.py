"""What a population of a language model needs in memory, and what a generation of it costs: counted, not measured.

A run holds some things all the time (weights, float32 masters, optimizer state, kept noise). On top of them come, one
after the other, the moments of a generation: noise is drawn, prompts are read, completions are written, parameters are
updated. Each moment is counted as the tensors that exist then, and the peak is what is always there plus the largest
moment. Tests compare the counts with measured memory; the interpreter and the libraries (about 0.5 GB) come on top.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eggroll.core.fitness import shape_fitness
from eggroll.core.records import UpdateRecord
from eggroll.core.select import ParameterSpec
from eggroll.errors import MemoryBudgetError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.generation.generate import COMPACT_FRACTION
from eggroll.llm.models.outline import Outline
from eggroll.llm.rewards.perplexity import LOGITS_BUDGET
from eggroll.torch.noise import CACHE_BYTES, CHUNK_BYTES

CPU_ROWS_BYTES = 2**30
"""What the members evaluated together may take on a CPU. It does not depend on the memory that happens to be free, so
that a resumed run evaluates as it did before."""
PROMPT_TOKENS = 64
"""Length of a prompt where it is not known yet."""


@dataclass(frozen=True)
class Workload:
    """What every member is evaluated on: ``rows`` prompts of ``prompt`` tokens, continued by up to ``new`` tokens.

    With ``new=0`` they are texts whose likelihood is scored.
    """

    rows: int
    prompt: int
    new: int = 0

    @property
    def length(self) -> int:
        """Tokens of a full row."""
        return self.prompt + self.new


@dataclass(frozen=True)
class Moment:
    """Bytes that exist only for a while, by what they hold."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """What a run needs: ``fixed`` bytes all the time, and the moments with ``members`` evaluated together."""

    members: int
    fixed: dict[str, int]
    moments: tuple[Moment, ...]

    @property
    def worst(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Most bytes that exist at once."""
        return sum(self.fixed.values()) + self.worst.total


@dataclass(frozen=True)
class Work:
    """What a generation costs.

    Attributes:
        normals: random numbers drawn.
        tokens: read and written, by all members.
        base: multiply-adds of the centre's matrices and of attention.
        low_rank: multiply-adds that the perturbations add.
        update: multiply-adds of the update's products.
        log_bytes: growth of ``updates.jsonl``.
    """

    normals: int
    tokens: int
    base: int
    low_rank: int
    update: int
    log_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Counts for a model under a run's settings.

    Args:
        outline: the model.
        config: the settings.
        dtype: of the weights.
    """

    outline: Outline
    config: EggrollConfig
    dtype: torch.dtype
    specs: tuple[ParameterSpec, ...]

    @classmethod
    def of(cls, outline: Outline, config: EggrollConfig, dtype: torch.dtype) -> Estimate:
        """Counts for the parameters that these settings evolve.

        Raises:
            SelectionError: a pattern matches nothing.
        """
        return cls(outline, config, dtype, tuple(outline.evolved(config)))

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def evolved(self) -> int:
        """Entries of the evolved parameters."""
        return sum(spec.size for spec in self.specs)

    @property
    def pairs(self) -> int:
        """Draws of a generation."""
        return self.config.population_size // 2 if self.config.antithetic else self.config.population_size

    @property
    def draw_bytes(self) -> int:
        """Bytes of one draw of all evolved parameters."""
        return 4 * sum(spec.draw_size(self.config.rank) for spec in self.specs)

    @property
    def noise_is_kept(self) -> bool:
        """Whether a generation's draws are kept from its evaluation to its update."""
        return self.pairs * self.draw_bytes <= CACHE_BYTES

    # Memory

    def fixed(self) -> dict[str, int]:
        """Bytes that a run holds all the time."""
        half, rounding = self.element < 4, self.config.rounding
        masters = 4 * self.evolved if half and rounding in ("auto", "master") else 0
        state = self.element if half and rounding == "nearest" else 4
        entries = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}[self.config.optimizer]
        return {
            "weights": self.element * self.outline.size,
            "masters": masters,
            "optimizer": entries * state * self.evolved,
            "noise": self.pairs * self.draw_bytes if self.noise_is_kept else 0,
        }

    def memory(self, workload: Workload, members: int | None = None) -> Memory:
        """Everything that a run needs with ``members`` evaluated together (by default as many as it would take)."""
        chosen = members or self.config.members_per_forward or self.members_that_fit(workload)
        chosen = min(chosen, self.config.population_size)
        moments = (*self._evaluation(workload, chosen), self._update())
        return Memory(chosen, self.fixed(), moments)

    def members_that_fit(self, workload: Workload, budget: int = CPU_ROWS_BYTES) -> int:
        """How many members are evaluated together by default: an even number within the budget, at least 2."""
        return min(self.config.population_size, max(2, budget // self.member_bytes(workload) // 2 * 2))

    def member_bytes(self, workload: Workload) -> int:
        """What one more member evaluated together needs."""
        return max(moment.total for moment in self._rows(workload, 1))

    def row_bytes(self, workload: Workload) -> int:
        """What one more row of the centre needs."""
        return max(moment.total - moment.parts["factors"] for moment in self._rows(replace(workload, rows=1), 1))

    def _factors(self, copies: int) -> int:
        """Perturbations of that many members (or rows) in the form that the forward pass uses."""
        entries = sum(spec.draw_size(self.config.rank) for spec in self.specs)
        return copies * self.element * entries

    def _evaluation(self, workload: Workload, members: int) -> list[Moment]:
        draws = -(-members // 2) if self.config.antithetic else members
        widest = 4 * max(spec.draw_size(self.config.rank) for spec in self.specs)
        drawing = Moment(
            "drawing noise",
            {
                "factors": self._factors(members),
                "draws": 0 if self.noise_is_kept else draws * self.draw_bytes,
                "temporaries": 2 * members * widest,
            },
        )
        moments = [drawing, *self._rows(workload, members)]
        if workload.new == 0:
            rows, length, o = members * workload.rows, workload.prompt, self.outline
            per_entry = (self.element if self.element < 4 else 0) + 2 * max(self.element, 4)
            step = rows * o.vocabulary * per_entry
            logits = min(length, max(1, LOGITS_BUDGET // step)) * step
            hidden = rows * length * o.width * self.element
            moments.append(
                Moment("scoring tokens", {"factors": self._factors(members), "activations": hidden, "logits": logits})
            )
        return moments

    def _rows(self, workload: Workload, members: int) -> list[Moment]:
        """The moments that grow with the rows evaluated together."""
        rows, factors = members * workload.rows, self._factors(members)
        if workload.new == 0:
            return [
                Moment("reading texts", {"factors": factors, "activations": rows * self._activations(workload.prompt)})
            ]
        reading = {
            "factors": factors,
            "cache": rows * self._cache(workload.prompt),
            "activations": rows * self._activations(workload.prompt),
        }
        # The last token is read no more. While a layer's cache grows by a token, it exists twice.
        last = self._cache(workload.length - 1)
        growing = last // max(self.outline.layers, 1) + self._activations(1)
        writing = {
            "factors": factors,
            "cache": rows * last,
            "activations": rows * growing,
            "logits": rows * self._logits(),
        }
        moments = [Moment("reading prompts", reading), Moment("writing the last token", writing)]
        # When some rows have ended, the others get factors of their own.
        left = round(rows * (1 - COMPACT_FRACTION))
        parts = {key: value * left // rows for key, value in writing.items()}
        moments.append(Moment("writing on after some have ended", {**parts, "factors": factors + self._factors(left)}))
        return moments

    def _cache(self, tokens: int) -> int:
        """Keys and values of one row."""
        o = self.outline
        return 2 * o.layers * o.kv_heads * o.head_size * tokens * self.element

    def _activations(self, tokens: int) -> int:
        """The largest set of one row's activations that exist at once: in a block's attention or its inner layer."""
        o = self.outline
        q, kv = o.heads * o.head_size, o.kv_heads * o.head_size
        # The embedded tokens, the block's input, its sum with the attention, and that normalised; then gate, up and
        # their product, or an activation function made of several operations.
        inner = 4 * o.width + (3 if o.gated else 4) * o.inner * max(o.experts_per_token, 1)
        attention = 3 * o.width + 4 * q + 2 * kv + (2 * q if kv < q else 0)
        total = max(inner, attention) * tokens * self.element
        if o.experts:
            # Each token gets a copy of the experts that the router chose for it.
            widest = max((math.prod(s.matrix_shape) for s in o.specs if s.kind == "experts"), default=0)
            total += tokens * o.experts_per_token * widest * self.element
        masks = tokens * tokens * (1 + self.element)
        scores = o.heads * tokens * tokens * (4 + 2 * self.element) if o.scores else 0
        return total + masks + scores

    def _logits(self) -> int:
        """One row's logits of a step, those of the step before, and what choosing a token makes of them."""
        widened = 4 if self.element < 4 else 0
        sampled = 16 if self.config.temperature > 0 else 0
        return self.outline.vocabulary * (2 * self.element + widened + sampled)

    def _update(self) -> Moment:
        """The parameter whose update needs most."""
        parts = [
            {
                "gradient": 4 * spec.size,
                "temporaries": max(self._gradient_temporaries(spec), self._step_temporaries(spec)),
            }
            for spec in self.specs
        ]
        return Moment("updating", max(parts, key=lambda part: sum(part.values())))

    def _gradient_temporaries(self, spec: ParameterSpec) -> int:
        rank = self.config.rank
        draw = 4 * spec.draw_size(rank)
        count = min(self.pairs, max(1, CHUNK_BYTES // draw))
        drawn = 0 if self.noise_is_kept else count * draw
        if not spec.low_rank:
            return max(drawn + 4 * spec.size, 2 * drawn if count < self.pairs else 0)
        m, n = (size * math.prod(spec.batch_shape) for size in spec.matrix_shape)
        weighted = 4 * count * m * rank
        copies = 4 * count * (m + n) * rank if rank > 1 else 0
        return weighted + max(drawn + copies, 2 * drawn if count < self.pairs else 0)

    def _step_temporaries(self, spec: ParameterSpec) -> int:
        """What a step makes besides the gradient: a copy from before, the negated gradient, the rule's own."""
        adam = self.config.optimizer in ("adam", "adamw")
        if self.element < 4 and self.config.rounding == "stochastic":
            return 36 * spec.size
        if self.element < 4 and self.config.rounding == "nearest":
            return (10 if adam else 6) * spec.size
        return (16 if adam else 8) * spec.size

    # Work

    def work(self, workload: Workload) -> Work:
        """What a generation costs."""
        config = self.config
        rows = config.population_size * workload.rows
        # Each row's tokens go through the model once, but for the last one that is written.
        read = workload.prompt + max(workload.new - 1, 0)
        judged = workload.new or workload.prompt
        base = sum(self._products(spec, read, judged) for spec in self.outline.specs) + self._attention(read)
        low_rank = sum(self._products(spec, read, judged, config.rank) for spec in self.specs)
        normals = self.pairs * sum(spec.draw_size(config.rank) for spec in self.specs)
        return Work(
            normals=normals if self.noise_is_kept else 2 * normals,
            tokens=rows * workload.length,
            base=rows * base,
            low_rank=rows * low_rank,
            update=self.pairs * config.rank * sum(spec.size for spec in self.specs if spec.low_rank),
            log_bytes=self._log_bytes(),
        )

    def _products(self, spec: ParameterSpec, read: int, judged: int, rank: int = 0) -> int:
        """Multiply-adds of a row in the products with one parameter, or in its low-rank term.

        ``read`` tokens go through the model, ``judged`` of them through the output head.
        """
        if not spec.low_rank:
            return 0
        m, n = spec.matrix_shape
        product = rank * (m + n) if rank else m * n
        if spec.name in self.outline.head:
            return judged * product
        if spec.kind == "embedding":
            is_head = self.outline.tied and m == self.outline.vocabulary
            return read * rank * n + (judged * product if is_head else 0)
        return read * product * (self.outline.experts_per_token if spec.kind == "experts" else 1)

    def _attention(self, read: int) -> int:
        """Multiply-adds of a row in scores and mixing: each token attends to all up to itself."""
        o = self.outline
        return 2 * o.layers * o.heads * o.head_size * (read * (read + 1) // 2)

    def _log_bytes(self) -> int:
        """Length of a line of ``updates.jsonl``."""
        config = self.config
        shaped = shape_fitness(
            np.arange(config.population_size, dtype=np.float64),
            method=config.fitness_shaping,
            sampling=config.sampling or "antithetic",
            group_size=config.group_size,
            elite_k=config.elite_k,
        )
        return len(UpdateRecord.make(0, config.sigma, config.lr, shaped).to_json()) + 1


def rows_budget(device: torch.device) -> int:
    """Bytes for what is evaluated together: on a GPU a quarter of the card's memory, on a CPU a fixed amount."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 4
    return CPU_ROWS_BYTES


def machine_memory(device: torch.device) -> tuple[int, int]:
    """Total and free bytes where a device keeps its tensors; a container's limit counts as the total."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024  # also what the file cache would give back
    limit, used = (_lines(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        total = min(total, int(limit[0]))
        free = min(free, max(0, total - int(used[0])))
    return total, free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")
    except OSError:
        return []


def check_memory(
    outline: Outline, config: EggrollConfig, dtype: torch.dtype, device: torch.device, *, free: bool = False
) -> None:
    """:func:`ensure_fits` for a device, before the reward and the data are known: with short texts.

    ``free`` counts only the memory that nobody uses at the moment, where several runs share a machine.

    Raises:
        MemoryBudgetError: such a run cannot fit.
    """
    if device.type in ("cpu", "cuda"):
        workload = Workload(
            config.prompts_per_generation * config.samples_per_prompt, min(PROMPT_TOKENS, config.max_length)
        )
        total, unused = machine_memory(device)
        where = f"this machine ({device}) free" if free else f"this machine ({device})"
        ensure_fits(Estimate.of(outline, config, dtype), workload, unused if free else total, where=where)


def ensure_fits(estimate: Estimate, workload: Workload, limit: int, *, where: str = "this machine") -> None:
    """Refuse a run that cannot fit, before anything is allocated.

    Args:
        estimate: the run.
        workload: what its members are evaluated on.
        limit: total bytes of memory.
        where: whose memory that is, for the message.

    Raises:
        MemoryBudgetError: what a run holds all the time, with two members evaluated together, is beyond the limit.
    """
    memory = estimate.memory(workload, min(2, estimate.config.population_size))
    if memory.peak <= limit:
        return
    worst = memory.worst
    parts = [f"{key} {gigabytes(value)}" for key, value in memory.fixed.items() if value]
    parts.append(f"{worst.name} {gigabytes(worst.total)}")
    raise MemoryBudgetError(
        f"{estimate.outline.name} with {estimate.outline.size / 1e9:.2f} billion parameters, of which "
        f"{estimate.evolved / 1e9:.2f} billion are evolved, needs {gigabytes(memory.peak)} even with {memory.members} "
        f"members evaluated together ({', '.join(parts)}), and {where} has {gigabytes(limit)}. "
        f"Ways out: {'; '.join(ways_out(estimate))}"
    )


def ways_out(estimate: Estimate) -> list[str]:
    """What would make a run smaller, the strongest first."""
    config, found = estimate.config, []
    if config.optimizer != "sgd" and estimate.fixed()["optimizer"]:
        found.append(f'optimizer="sgd" (saves {gigabytes(estimate.fixed()["optimizer"])})')
    if estimate.element == 4:
        found.append('dtype="bfloat16" with rounding="stochastic"')
    elif estimate.fixed()["masters"] and estimate.dtype == torch.bfloat16:
        found.append(f'rounding="stochastic" (saves {gigabytes(estimate.fixed()["masters"])})')
    if config.target_modules is None:
        found.append("target_modules=['q_proj', 'v_proj'] or other patterns that evolve fewer parameters")
    return [*found, "a shorter max_tokens or max_length", "a smaller model"]


def gigabytes(size: int) -> str:
    """A size for people: ``1.50 GB``, ``12.3 MB``."""
    if size >= 10**9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
