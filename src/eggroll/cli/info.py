"""``eggroll info``: what a model is made of and what a population of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from eggroll.core.check import whole
from eggroll.core.settings import narrowed, setting
from eggroll.llm.choosing.auto import with_stand_ins
from eggroll.llm.config import EggrollConfig, ModelOptions
from eggroll.llm.options import TuneSettings
from eggroll.run.terminal import Terminal

if TYPE_CHECKING:
    import torch

    from eggroll.llm.estimate.memory import Estimate, Memory, Workload
    from eggroll.llm.models.outline import Outline


@dataclass(frozen=True, kw_only=True)
class InfoOptions(ModelOptions, TuneSettings):
    """The settings of ``eggroll tune`` that change what a run needs."""

    model: str = setting(positional="MODEL")
    """Hub id, local directory, .gguf file, or smollm2-135m, gemma3-270m, qwen2.5-coder-1.5b."""
    prompt_tokens: int = 64
    """Length of a prompt in tokens."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        return [*super().problems(), *whole(self, prompt_tokens=1)]


OPTIONS = InfoOptions


def run(options: InfoOptions) -> int:
    """Show a model's parameters and what a population of it needs; its weights are not loaded."""
    from eggroll.llm.estimate.machine import rows_budget
    from eggroll.llm.estimate.memory import Estimate, Workload
    from eggroll.llm.models.outline import look_up

    config: EggrollConfig = narrowed(with_stand_ins(options), EggrollConfig)
    found = look_up(
        options.model,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        quantize=options.quantize,
        revision=options.revision,
        attn_implementation=options.attn_implementation,
    )
    estimate = Estimate.of(found.outline, config, found.dtype)
    prompts = config.prompts_per_generation
    workloads = {
        "written answers": Workload(prompts * config.samples_per_prompt, options.prompt_tokens, config.max_tokens),
        "perplexity": Workload(prompts, options.max_length),
    }
    memories = {}
    for name, workload in workloads.items():
        members = options.members_per_forward or estimate.members_that_fit(workload, rows_budget(found.device))
        memories[name] = estimate.memory(workload, members)
    dtype = str(found.dtype).removeprefix("torch.")
    out = Terminal(highlight=False).print
    out(f"[bold]{escape(found.name)}[/]  {found.outline.name}, {_number(found.outline.size)} parameters, {dtype}")
    for note in found.notes:
        out(f"[dim]{escape(note)}[/]")
    for table in (
        _architecture(found.outline, found.dtype),
        _parameters(estimate),
        _memory(estimate, memories),
        _work(estimate, workloads),
    ):
        out()
        out(table)
    out()
    for line in _fit(estimate, memories, found.device):
        out(line, soft_wrap=True)
    return 0


def _architecture(outline: Outline, dtype: torch.dtype) -> Table:
    from eggroll.lifecycle.memory import gigabytes

    rows = {"layers": f"{outline.layers}", "width": f"{outline.width}"}
    rows["inner width"] = f"{outline.inner}{' (gated)' if outline.gated else ''}"
    if outline.experts:
        rows["experts"] = f"{outline.experts}, {outline.experts_per_token} for each token"
    if outline.heads:
        shared = f", {outline.kv_heads} for keys and values" if outline.kv_heads != outline.heads else ""
        rows["heads"] = f"{outline.heads} of size {outline.head_size}{shared}"
    if outline.state:
        size = gigabytes(outline.state_bytes(dtype.itemsize))
        rows["recurrent state"] = f"{size} for each row, in float32, at any length"
    rows["vocabulary"] = f"{outline.vocabulary}"
    rows["output head"] = (
        "its own" if outline.head else "the embedding (tied)" if outline.tied else "none that is a single matrix"
    )
    table = _table("architecture", "", "")
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _parameters(estimate: Estimate) -> Table:
    outline = estimate.outline
    evolved, total = outline.counts(estimate.specs), outline.size
    table = _table("parameters", "kind", "tensors", "entries", "share", "evolved")
    for kind, (tensors, entries) in outline.counts().items():
        table.add_row(kind, f"{tensors}", f"{entries:,}", f"{entries / total:.1%}", f"{evolved.get(kind, (0, 0))[1]:,}")
    table.add_row("total", f"{len(outline.specs)}", f"{total:,}", "100.0%", f"{estimate.evolved:,}", style="bold")
    return table


def _memory(estimate: Estimate, memories: dict[str, Memory]) -> Table:
    from eggroll.lifecycle.memory import gigabytes

    config = estimate.config
    title = f"memory, {config.population_size} members, rank {config.rank}, {config.optimizer}"
    table = _table(title, "", *memories)
    table.add_row("members evaluated together", *(f"{memory.members}" for memory in memories.values()))
    names = {
        "weights": "weights", "codes": "codes of quantized weights", "scales": "their scales",
        "residual": "residual of their updates", "masters": "float32 masters", "optimizer": "optimizer state",
        "noise": "kept noise", "start weights": "start weights, to pull towards",
    }  # fmt: skip
    for key, value in estimate.fixed().items():
        table.add_row(names[key], *(gigabytes(value) if value else "-" for _ in memories))
    moments = list(dict.fromkeys(moment.name for memory in memories.values() for moment in memory.moments))
    moments.sort(key=lambda name: name == "updating")
    for name in moments:
        row = []
        for memory in memories.values():
            moment = next((moment for moment in memory.moments if moment.name == name), None)
            mark = " *" if moment is not None and moment is memory.worst else ""
            row.append("-" if moment is None else f"{gigabytes(moment.total)}{mark}")
        table.add_row(f"+ while {name}", *row)
    table.add_row("peak", *(gigabytes(memory.peak) for memory in memories.values()), style="bold")
    table.caption = (
        "peak: what is always there, plus the largest of the moments (*); the libraries take about 0.5 GB more"
    )
    table.caption_justify = "left"
    return table


def _work(estimate: Estimate, workloads: dict[str, Workload]) -> Table:
    from eggroll.llm.estimate.work import work_of

    config = estimate.config
    per_row = [
        f"{load.rows} x ({load.prompt} + {load.new})" if load.new else f"{load.rows} x {load.prompt}"
        for load in workloads.values()
    ]
    works = [work_of(estimate, load) for load in workloads.values()]
    table = _table("each generation", "", *workloads)
    table.add_row("tokens of a member", *per_row)
    table.add_row("tokens", *(_number(work.tokens) for work in works))
    table.add_row("normals drawn", *(_number(work.normals) for work in works))
    table.add_row("multiply-adds of the model", *(_number(work.base) for work in works))
    table.add_row(
        f"  of perturbations of rank {config.rank}",
        *(f"{_number(work.low_rank)} ({work.low_rank / work.base:.2%})" for work in works),
    )
    table.add_row("  of the update", *(f"{_number(work.update)} ({work.update / work.base:.2%})" for work in works))
    table.add_row("log", *(f"{work.log_bytes:,} bytes" for work in works))
    return table


def _fit(estimate: Estimate, memories: dict[str, Memory], device: torch.device) -> list[str]:
    from eggroll.lifecycle.memory import gigabytes
    from eggroll.llm.estimate.machine import machine_memory, ways_out

    if device.type not in ("cpu", "cuda"):
        return [f"how much memory {device} has is not known"]
    total, free = machine_memory(device)
    lines = []
    for name, memory in memories.items():
        if memory.peak <= free:
            verdict = "[green]fits[/]"
        elif memory.peak <= total:
            verdict = "[yellow]fits only if other programs make room[/]"
        else:
            verdict = "[red]does not fit[/]"
        room = f"{gigabytes(free)} of {gigabytes(total)} free on {device}"
        lines.append(f"{name}: {verdict}: {gigabytes(memory.peak)} needed, {room}")
    if any(memory.peak > total for memory in memories.values()):
        lines.append(f"ways out: {escape('; '.join(ways_out(estimate)))}")
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and any(columns) else "left", no_wrap=True)
    return table


def _number(value: int) -> str:
    """A count for people: ``134.5 M``."""
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value}"
