"""Whether a run fits into this machine, said before anything is allocated."""

from __future__ import annotations

import torch

from eggroll.errors import MemoryBudgetError
from eggroll.lifecycle.memory import gigabytes, host_memory
from eggroll.llm.config import EggrollConfig
from eggroll.llm.estimate.memory import CPU_ROWS_BYTES, Estimate, Workload
from eggroll.llm.models.outline import Outline

PROMPT_TOKENS = 64
"""Length of a prompt where it is not known yet."""


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
    return host_memory()


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
    if "start weights" in estimate.fixed():
        found.append(f"anchored_weight_decay=0 (saves {gigabytes(estimate.fixed()['start weights'])})")
    if estimate.element == 4:
        found.append('dtype="bfloat16" with rounding="stochastic"')
    elif estimate.fixed()["masters"] and estimate.dtype == torch.bfloat16:
        found.append(f'rounding="stochastic" (saves {gigabytes(estimate.fixed()["masters"])})')
    if config.target_modules is None:
        found.append("target_modules=['q_proj', 'v_proj'] or other patterns that evolve fewer parameters")
    return [*found, "a shorter max_tokens or max_length", "a smaller model"]
