"""What a generation of a language model's population costs: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eggroll.core.records import UpdateRecord
from eggroll.core.select import ParameterSpec
from eggroll.llm.config import EggrollConfig
from eggroll.llm.estimate.memory import Estimate, Workload


@dataclass(frozen=True)
class Work:
    """What a generation costs.

    Attributes:
        normals: random numbers drawn.
        tokens: read and written, by all members.
        base: multiply-adds of the center's matrices and of attention.
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


def work_of(estimate: Estimate, workload: Workload) -> Work:
    """What a generation costs."""
    config = estimate.config
    rows = config.population_size * workload.rows
    # Each row's tokens go through the model once, but for the last one that is written.
    read = workload.prompt + max(workload.new - 1, 0)
    judged = workload.new or workload.prompt
    base = sum(_products(estimate, spec, read, judged) for spec in estimate.outline.specs) + _attention(estimate, read)
    low_rank = sum(_products(estimate, spec, read, judged, config.rank) for spec in estimate.specs)
    normals = estimate.pairs * sum(spec.draw_size(config.rank) for spec in estimate.specs)
    return Work(
        normals=normals if estimate.noise_is_kept else 2 * normals,
        tokens=rows * workload.length,
        base=rows * base,
        low_rank=rows * low_rank,
        update=estimate.pairs * config.rank * sum(spec.size for spec in estimate.specs if spec.low_rank),
        log_bytes=_log_bytes(config),
    )


def _products(estimate: Estimate, spec: ParameterSpec, read: int, judged: int, rank: int = 0) -> int:
    """Multiply-adds of a row in the products with one parameter, or in its low-rank term.

    ``read`` tokens go through the model, ``judged`` of them through the output head.
    """
    if not spec.low_rank:
        return 0
    m, n = spec.matrix_shape
    product = rank * (m + n) if rank else m * n
    if spec.name in estimate.outline.head:
        return judged * product
    if spec.kind == "embedding":
        is_head = estimate.outline.tied and m == estimate.outline.vocabulary
        return read * rank * n + (judged * product if is_head else 0)
    return read * product * (estimate.outline.experts_per_token if spec.kind == "experts" else 1)


def _attention(estimate: Estimate, read: int) -> int:
    """Multiply-adds of a row in scores and mixing: each token attends to all up to itself."""
    o = estimate.outline
    return 2 * o.layers * o.heads * o.head_size * (read * (read + 1) // 2)


def _log_bytes(config: EggrollConfig) -> int:
    """Length of a line of ``updates.jsonl``."""
    shaped = config.shape(np.arange(config.population_size, dtype=np.float64))
    return len(UpdateRecord.make(0, config.sigma, config.lr, shaped).to_json()) + 1
