"""A run of ``eggroll pretrain``: its data, its worker, and what it leaves."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from eggroll import lifecycle
from eggroll._command import typed
from eggroll.distributed.partition import default_range_size
from eggroll.errors import RunError
from eggroll.lifecycle import Plan, RunKind, Saved, Sitting, Trained
from eggroll.lifecycle.memory import ensure_fits, generation_line
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import load_corpus
from eggroll.pretrain.measure import baseline_bits
from eggroll.pretrain.memory import members_at_once, parts_of, ways_out
from eggroll.pretrain.worker import IntegerWorker, PretrainWorker
from eggroll.run.run_dir import RunDir

MOST_MEMBERS = 4096
"""Members of a range that worker processes score together, at most: enough for all threads of an engine."""


def train(options: PretrainOptions, **watching: Any) -> Trained:
    """Train a language model: :func:`eggroll.lifecycle.train`, whose other arguments ``watching`` may have.

    Raises:
        ConfigError: settings cannot work.
        DataError: the data cannot be read, or are shorter than a window.
        RunError: the run to resume was started with other settings or data.
    """
    return lifecycle.train(KIND, options, **watching)


def make_worker(options: PretrainOptions, *, with_data: bool = True) -> PretrainWorker:
    """The model as a run begins with it, in the precision of the options.

    Args:
        options: the settings.
        with_data: false for a model that only applies records and generates text.

    Raises:
        ConfigError: there is no such device or backend here.
        DataError: the data cannot be read.
    """
    corpus = load_corpus(options.data, text_column=options.text_column) if with_data else None
    if options.precision == "int8":
        return IntegerWorker(options, corpus)
    from eggroll.pretrain.float_worker import FloatWorker

    return FloatWorker(options, corpus)


def options_of_run(path: str | Path) -> PretrainOptions:
    """The settings of a run.

    Raises:
        RunError: it is a run of something else.
    """
    found: PretrainOptions = lifecycle.options_of_run(KIND, path)
    return found


def model_of_run(path: str | Path, *, generation: int | None = None, **machine: Any) -> PretrainWorker:
    """The model of a run: from its newest checkpoint and the records after it, or rebuilt from the first generation.

    Args:
        path: the run's directory.
        generation: updates that it shall have; ``None`` is all that are logged.
        **machine: ``backend``, ``device``, ``threads``: not those of the run, which may be from another machine.

    Raises:
        RunError: it is not a run of ``eggroll pretrain``, or has fewer updates.
        ConfigError: there is no such device or backend here.
    """
    run, worker = RunDir.open(path), make_worker(_here(options_of_run(path), **machine), with_data=False)
    records = run.updates()
    wanted = len(records) if generation is None else generation
    if not 0 <= wanted <= len(records):
        raise RunError(f"generation {wanted} of {path}: its log holds {len(records)} finished generations")
    checkpoint, start = run.latest_checkpoint(), 0
    if checkpoint is not None and checkpoint.generation <= wanted:
        worker.load_state_tensors(checkpoint.load())
        start = checkpoint.generation
    for record in records[start:wanted]:
        worker.apply(record)
    return worker


def sample_run(
    path: str | Path, prompt: str, length: int, *, temperature: float = 1.0, seed: int = 0, **machine: Any
) -> str:
    """Text of a run's model after a prompt (the prompt is not repeated); ``machine`` as for :func:`model_of_run`."""
    made = model_of_run(path, **machine).sample(prompt.encode(), length, temperature=temperature, seed=seed)
    return made.decode("utf-8", errors="replace")


def _here(options: PretrainOptions, **machine: Any) -> PretrainOptions:
    """The options of a run on this machine, whatever it was made on."""
    here = {"backend": "auto", "device": "auto", "threads": None, "members_per_forward": None, **machine}
    return dataclasses.replace(options, **here)


def _plan(options: PretrainOptions) -> Plan:
    corpus = load_corpus(options.data, text_column=options.text_column)
    corpus.check(options.context + options.tokens + 1)
    title = f"{options.n_layers} {'layer' if options.n_layers == 1 else 'layers'} x {options.hidden}"
    size, parts = options.population_size, parts_of(options)
    ensure_fits(f"a population of {size:,} members of {title}", parts, ways_out(options))
    name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(options.data).stem).strip("-").lower()

    def describe(worker: Any) -> list[str]:
        engine = worker.engine_name if isinstance(worker, PretrainWorker) else f"{options.workers} workers"
        return [
            f"[bold]{title}[/], {options.shape.size:,} {options.precision} parameters",
            f"data     {escape(options.data)}: {len(corpus.train):,} bytes to train on, "
            f"{len(corpus.validation):,} held out",
            f"search   {options.population_size:,} members x {options.tokens} bytes, {options.group_size} a window, "
            f"rank {options.rank}, sigma 2^-{options.sigma_shift}, seed {options.seed}",
            f"engine   {engine}",
            generation_line(f"{size * options.tokens:,} bytes", size, members_at_once(options), sum(parts.values())),
            "[dim]the held-out reward is minus the bits per byte of held-out text[/]",
        ]

    return Plan(
        options=options,
        config=options.es(),
        make_worker=partial(make_worker, options),
        finish=_finish,
        title=title,
        name=f"pretrain-{name}",
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        stop=_time_is_up(options),
        describe=describe,
        facts={"model": title, "device": options.device},
        fingerprints={"data_fingerprint": corpus.fingerprint(), "contents_fingerprint": corpus.contents()},
        placement={"range_size": range_size(options)},
    )


def range_size(options: PretrainOptions) -> int:
    """Members that a worker process scores together: whole groups; in floating point whole forward passes."""
    if options.precision != "int8":
        from eggroll.pretrain.float_worker import members_per_forward

        step = min(members_per_forward(options), options.population_size)
        return step + step % 2
    size = default_range_size(options.population_size, MOST_MEMBERS)
    return min(-(-size // options.group_size) * options.group_size, options.population_size)


def _timed(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in run.metrics() if "evaluate_s" in line]


def _time_is_up(options: PretrainOptions) -> Callable[[list[dict[str, Any]]], bool] | None:
    """Whether ``--minutes`` are over, counting those that a resumed run has spent before."""
    if options.minutes is None:
        return None
    before = [] if options.resume is None else _timed(RunDir.open(options.resume))
    spent = sum(line["evaluate_s"] + line["update_s"] for line in before)
    seconds = 60 * options.minutes

    def over(history: list[dict[str, Any]]) -> bool:
        now = history[-1]["elapsed_s"] if len(history) > len(before) else 0.0
        return bool(spent + now >= seconds)

    return over


def _finish(worker: PretrainWorker, run: RunDir, sitting: Sitting) -> dict[str, Any]:
    """Bits per byte of all of the held-out text, beside those of the unigram and the bigram baseline."""
    options, corpus, lines = worker.options, worker.corpus, _timed(run)
    last = run.metrics()[-1] if run.metrics() else {}
    everything = len(corpus.validation) - 1
    if last.get("generation") == sitting.generation and last.get("validation_bytes") == everything:
        bits, count = last["validation_bits_per_byte"], everything
    else:
        bits, count = worker.bits_per_byte(corpus.validation)
    spent = sum(line["evaluate_s"] for line in lines)
    tokens = sitting.generation * options.population_size * options.tokens
    return {
        "validation_bits_per_byte": bits,
        "validation_bytes": count,
        **baseline_bits(corpus.train, corpus.validation),
        "generations": sitting.generation,
        "member_tokens": tokens,
        "parameters": options.shape.size,
        "evaluate_s": spent,
        "update_s": sum(line["update_s"] for line in lines),
        "elapsed_s": lines[-1]["elapsed_s"] if lines else 0.0,
        "tokens_per_s": tokens / spent if spent else 0.0,
    }


def _save(worker: PretrainWorker, directory: Path, generation: int) -> Saved:
    from safetensors.torch import save_file

    path = directory / "model.safetensors"
    save_file(worker.weights(), path)
    return Saved("weights", path, [f'safetensors.numpy.load_file("{path}")'])


def sample_command(run: RunDir) -> str | None:
    """The command that prints text of a run's model; ``None`` before its first generation."""
    return f"{typed()} pretrain --sample {shlex.quote(str(run.path))} --prompt '...'" if run.updates() else None


KIND = RunKind(
    name="pretrain",
    options=PretrainOptions,
    plan=_plan,
    base=lambda options, run: make_worker(_here(options), with_data=False),
    save=_save,
    load_line=sample_command,
    retired=("sample", "temperature"),
)
