"""A run of ``eggroll pretrain``: set up, evolve, validate, sample, report."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from eggroll.errors import ConfigError, RunError
from eggroll.loop import Heldout, Listener, Loop
from eggroll.pretrain import measure
from eggroll.pretrain.config import FREE, PretrainOptions
from eggroll.pretrain.data import Corpus, load_corpus
from eggroll.pretrain.worker import IntegerLearner
from eggroll.run.run_dir import RunDir

if TYPE_CHECKING:
    from eggroll.pretrain.model.floating import FloatLearner

KIND = "pretrain"
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PretrainOptions)}
RESULT = "result.json"


AnyLearner: TypeAlias = "IntegerLearner | FloatLearner"


@dataclass(frozen=True)
class Trained:
    """A run that is over.

    Attributes:
        run: its directory.
        learner: the model.
        result: what is in ``result.json``; empty if the run was interrupted.
        interrupted: whether it ended before its last generation.
        generation: updates done.
    """

    run: RunDir
    learner: AnyLearner
    result: dict[str, Any]
    interrupted: bool
    generation: int


def run(options: PretrainOptions) -> dict[str, Any]:
    """Train a model and return what came of it, as in ``result.json``: :func:`train` without a display."""
    return train(options).result


def train(
    options: PretrainOptions,
    *,
    listeners: Callable[[RunDir, int], Sequence[Listener]] | None = None,
    opened: Callable[[RunDir, AnyLearner, Corpus], Any] | None = None,
) -> Trained:
    """Train a language model.

    Args:
        options: the settings; with ``resume`` those of the run (:func:`options_of_run`).
        listeners: makes those who are told of each generation, from the run and the generations already done.
        opened: told when the run is set up, before its first generation.

    Raises:
        ConfigError: settings cannot work.
        DataError: the data cannot be read, or are shorter than a window.
        RunError: the run to resume was started with other settings or data.
    """
    corpus = load_corpus(options.data, text_column=options.text_column)
    corpus.check(options.context + options.tokens + 1)
    learner = make_learner(options, corpus)  # before the run: what cannot work here leaves none behind
    run_dir = _open_run(options, corpus)
    began, before = time.perf_counter(), _seconds_done(run_dir)
    held = _HeldOut(options, learner, corpus)
    config = learner.config
    loop = Loop(
        config=config,
        learner=learner,
        evaluate=learner.evaluate,
        heldout=held,
        eval_every=options.eval_every,
        run=run_dir,
        checkpoint_every=options.checkpoint_every,
        stop=_time_is_up(options, began - before),
    )
    start = loop.resume() if options.resume is not None else 0
    held.generation = lambda: loop.applied
    if opened is not None:
        opened(run_dir, learner, corpus)
    if listeners is not None:
        loop.listeners = list(listeners(run_dir, start))
    if start < config.generations:
        loop.go(start)
    result = {} if loop.interrupted else _finish(run_dir, held, corpus, options, loop)
    return Trained(run_dir, learner, result, loop.interrupted, loop.applied)


def make_learner(options: PretrainOptions, corpus: Corpus | None) -> AnyLearner:
    """The model as a run begins with it, in the precision of the options; without a corpus it can only replay."""
    if options.precision == "int8":
        return IntegerLearner(options, corpus)
    from eggroll.pretrain.model.floating import FloatLearner

    return FloatLearner(options, corpus)


def options_of_run(path: str) -> PretrainOptions:
    """The settings of a run of ``eggroll pretrain``.

    Raises:
        RunError: it is a run of something else.
    """
    config = RunDir.open(path).config
    if config.get("kind") != KIND:
        raise RunError(f"{path} is no run of eggroll pretrain")
    stored = {key: value for key, value in config.items() if key not in ("kind", "data_fingerprint")}
    known = {field.name for field in dataclasses.fields(PretrainOptions)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise RunError(f"{path}/config.json has settings that this version does not know: {', '.join(unknown)}")
    return PretrainOptions(**stored)


def learner_of_run(path: str, **machine: Any) -> AnyLearner:
    """The first model of a run, to be replayed on this machine, whatever the run was made on.

    Args:
        path: the run's directory.
        **machine: ``backend``, ``device``, ``threads``, ``members_per_forward``; what is not given is chosen.

    Raises:
        RunError: it is no such run.
        ConfigError: there is no such device or backend here.
    """
    here = {"backend": "auto", "device": "auto", "threads": None, "members_per_forward": None, **machine}
    return make_learner(dataclasses.replace(options_of_run(path), **here), None)


def model_of_run(path: str, *, generation: int | None = None, **machine: Any) -> AnyLearner:
    """The model of a run: from its newest checkpoint and the records after it, or rebuilt from the first generation.

    Args:
        path: the run's directory.
        generation: updates that it shall have; ``None`` is all that are logged.
        **machine: as for :func:`learner_of_run`.

    Raises:
        RunError: it is no such run, or has not so many updates.
        ConfigError: there is no such device or backend here.
    """
    run_dir, learner = RunDir.open(path), learner_of_run(path, **machine)
    records = run_dir.updates()
    wanted = len(records) if generation is None else generation
    if not 0 <= wanted <= len(records):
        raise RunError(f"generation {wanted} of {path}: its log holds {len(records)} finished generations")
    checkpoint, start = run_dir.latest_checkpoint(), 0
    if checkpoint is not None and checkpoint.generation <= wanted:
        learner.load_state_tensors(checkpoint.load())
        start = checkpoint.generation
    for record in records[start:wanted]:
        learner.apply(record)
    return learner


def sample_run(path: str, prompt: str, length: int, *, temperature: float = 1.0, seed: int = 0, **machine: Any) -> str:
    """Text of a run's model after a prompt (the prompt is not repeated); ``machine`` as for :func:`learner_of_run`."""
    made = model_of_run(path, **machine).sample(prompt.encode(), length, temperature=temperature, seed=seed)
    return made.decode("utf-8", errors="replace")


class _HeldOut:
    """Bits per byte of held-out text, and now and then a sample."""

    def __init__(self, options: PretrainOptions, learner: AnyLearner, corpus: Corpus) -> None:
        self.options, self.learner, self.corpus = options, learner, corpus
        self.generation: Callable[[], int] = lambda: 0
        self._all: tuple[int, tuple[float, int]] | None = None

    def __call__(self) -> Heldout:
        options, generation = self.options, self.generation()
        last = generation == options.generations
        if last:
            bits, count = self.everything()
        else:
            bits, count = self.learner.bits_per_byte(self.corpus.validation, options.eval_tokens)
        samples = []
        every = options.sample_every
        if every and (last or generation % every < options.eval_every):
            made = self.learner.sample(options.prompt.encode(), options.sample_length, seed=generation)
            text = made.decode("utf-8", errors="replace")
            samples = [{"member": -1, "prompt": options.prompt, "completion": text, "reward": -bits}]
        metrics = {"validation_bits_per_byte": bits, "validation_bytes": float(count)}
        return Heldout(-bits, samples, metrics)

    def everything(self) -> tuple[float, int]:
        """Bits per byte of all held-out text, and how many bytes that is; once for a generation."""
        generation = self.generation()
        if self._all is None or self._all[0] != generation:
            self._all = generation, self.learner.bits_per_byte(self.corpus.validation)
        return self._all[1]


def _open_run(options: PretrainOptions, corpus: Corpus) -> RunDir:
    settings = {"kind": KIND, "data_fingerprint": corpus.fingerprint(), **options.to_dict()}
    extra = {"model": f"{options.n_layers} layers x {options.hidden}", "device": options.device}
    if options.resume is None:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", Path(options.data).stem).strip("-").lower()
        path = Path(options.output or f"runs/pretrain-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        return RunDir.create(path, settings, extra=extra)
    run_dir = RunDir.open(options.resume)
    if run_dir.config.get("kind") != KIND:
        raise RunError(f"{run_dir.path} is no run of eggroll pretrain")
    done = len(run_dir.updates())
    if done > options.generations:
        raise ConfigError(
            f"--generations {options.generations}: the run in {run_dir.path} has {done} finished generations already; "
            "give more"
        )
    known = {name: value for name, value in settings.items() if name in run_dir.config or value != _DEFAULTS.get(name)}
    run_dir.check_config(known, may_change=_free(options))  # options that are newer than the run have their defaults
    run_dir.update_config(settings)
    run_dir.note_resume(done)
    return run_dir


def _free(options: PretrainOptions) -> tuple[str, ...]:
    """What a resumed run may change: a schedule that ends with the last generation does not allow another one.

    In floating point the device and the members at once change the last bits.
    """
    if options.precision != "int8":
        return tuple(name for name in FREE if name not in ("generations", "device", "members_per_forward"))
    return tuple(name for name in FREE if name != "generations" or options.alpha_schedule != "exponential")


def _seconds_done(run_dir: RunDir) -> float:
    lines = [line for line in run_dir.metrics() if "evaluate_s" in line]
    return float(sum(line["evaluate_s"] + line["update_s"] for line in lines))


def _time_is_up(options: PretrainOptions, began: float) -> Callable[[dict[str, Any]], bool] | None:
    if options.minutes is None:
        return None
    seconds = 60 * options.minutes
    return lambda _: time.perf_counter() - began >= seconds


def _finish(run_dir: RunDir, held: _HeldOut, corpus: Corpus, options: PretrainOptions, loop: Loop) -> dict[str, Any]:
    """Validate on all of the held-out text, compare with tables of counts, write ``result.json``."""
    bits, count = held.everything()
    lines = [line for line in run_dir.metrics() if "evaluate_s" in line]
    spent = sum(line["evaluate_s"] for line in lines)
    updating = sum(line["update_s"] for line in lines)
    tokens = loop.applied * options.pop_size * options.tokens
    result = {
        "validation_bits_per_byte": bits,
        "validation_bytes": count,
        **measure.table_bits(corpus.train, corpus.validation),
        "generations": loop.applied,
        "member_tokens": tokens,
        "parameters": options.shape.size,
        "evaluate_s": spent,
        "update_s": updating,
        "elapsed_s": lines[-1]["elapsed_s"] if lines else 0.0,
        "tokens_per_s": tokens / spent if spent else 0.0,
    }
    run_dir.write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result
