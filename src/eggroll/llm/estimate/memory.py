"""What a population of a language model needs in memory: counted, not measured.

A run holds some things all the time (weights, float32 masters, optimizer state, kept noise). On top of them come, one
after the other, the moments of a generation: noise is drawn, prompts are read, completions are written, parameters are
updated. Each moment is counted as the tensors that exist then, and the peak is what is always there plus the largest
moment. Tests compare the counts with measured memory; the interpreter and the libraries (about 0.5 GB) come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from eggroll.core.select import ParameterSpec
from eggroll.llm.config import EggrollConfig
from eggroll.llm.generation.generate import COMPACT_FRACTION
from eggroll.llm.models.outline import Outline
from eggroll.llm.rewards.perplexity import LOGITS_BUDGET
from eggroll.torch.noise import CACHE_BYTES, CHUNK_BYTES

CPU_ROWS_BYTES = 2**30
"""What the members evaluated together may take on a CPU. It does not depend on the memory that happens to be free, so
that a resumed run evaluates as it did before."""


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

    def fixed(self) -> dict[str, int]:
        """Bytes that a run holds all the time."""
        half, rounding = self.element < 4, self.config.rounding
        moved = sum(spec.size for spec in self.specs if self._is_quantized(spec))
        masters = 4 * (self.evolved - moved) if half and rounding in ("auto", "master") else 0
        state = self.element if half and rounding == "nearest" else 4
        entries = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}[self.config.optimizer]
        return {
            "weights": self.element * sum(s.size for s in self.outline.specs if not self._is_quantized(s)),
            **self._quantized_bytes(moved),
            "masters": masters,
            **({"start weights": self.element * (self.evolved - moved)} if self.config.anchored_weight_decay else {}),
            "optimizer": entries * (state * (self.evolved - moved) + 4 * moved),
            "noise": self.pairs * self.draw_bytes if self.noise_is_kept else 0,
        }

    def _is_quantized(self, spec: ParameterSpec) -> bool:
        return spec.name in self.outline.bits

    def _quantized_bytes(self, moved: int) -> dict[str, int]:
        """What quantized weights take; nothing is said of it where there are none."""
        bits = self.outline.bits
        if not bits:
            return {}
        held = [(spec.size, *bits[spec.name]) for spec in self.outline.specs if spec.name in bits]
        return {
            "codes": round(sum(size * code for size, code, _ in held) / 8),
            "scales": round(sum(size * shared for size, _, shared in held) / 8),
            "residual": 2 * moved if self.config.quantized_update == "error_feedback" else 0,
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
        """What one more row of the center needs."""
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
        # The last token is read no more. While a layer's cache grows by a token, it exists twice; a recurrent state is
        # made anew, and the one before it is let go when all layers have theirs.
        last = self._cache(workload.length - 1)
        growing = (last if self.outline.state else last // max(self.outline.layers, 1)) + self._activations(1)
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
        """Keys and values of one row; a recurrent state (float32) is as large after any number of tokens."""
        o = self.outline
        if o.state:
            return o.state_bytes(self.element)
        return 2 * o.layers * o.kv_heads * o.head_size * tokens * self.element

    def _activations(self, tokens: int) -> int:
        """The largest set of one row's activations that exist at once: in a block's attention or its inner layer."""
        o = self.outline
        q, kv = o.heads * o.head_size, o.kv_heads * o.head_size
        # The embedded tokens, the block's input, its sum with the attention, and that normalized; then gate, up and
        # their product, or an activation function made of several operations.
        inner = 4 * o.width + (3 if o.gated else 4) * o.inner * max(o.experts_per_token, 1)
        attention = 3 * o.width + 4 * q + 2 * kv + (2 * q if kv < q else 0)
        if o.state:  # what the recurrence reads and writes, in float32, beside the projections that it was made of
            attention = 12 * o.width + 9 * o.width * 4 // self.element
        total = max(inner, attention) * tokens * self.element
        if o.experts:
            # Each token gets a copy of the experts that the router chose for it.
            widest = max((math.prod(s.matrix_shape) for s in o.specs if s.kind == "experts"), default=0)
            total += tokens * o.experts_per_token * widest * self.element
        masks = 0 if o.state else tokens * tokens * (1 + self.element)
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
        if self._is_quantized(spec):  # the step, quanta, codes, moves; each in 4 or 2 bytes
            return (36 if adam else 28) * spec.size
        if self.element < 4 and self.config.rounding == "stochastic":
            return 36 * spec.size
        if self.element < 4 and self.config.rounding == "nearest":
            return (10 if adam else 6) * spec.size
        return (16 if adam else 8) * spec.size
