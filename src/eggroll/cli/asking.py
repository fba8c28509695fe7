"""What ``eggroll chat`` and ``eggroll generate`` share: which model is asked, and with what settings."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from eggroll._command import typed
from eggroll.core.settings import setting
from eggroll.errors import ConfigError, ModelError, RunError
from eggroll.llm.config import Dtype, EggrollConfig, ModelOptions

if TYPE_CHECKING:
    from eggroll.llm.measure.answers import Writer
    from eggroll.run.run_dir import RunDir

AFTER, BEFORE = "after", "before"
MARKS = ("updates.jsonl", "metrics.jsonl", "environment.json")
"""Files that tell a run's directory from a model's; both have a config.json."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which model is asked."""

    model: str = setting(positional="MODEL")
    """A run's directory; or a model: hub id, local directory, .gguf file, or smollm2-135m, gemma3-270m,
    qwen2.5-coder-1.5b."""


@dataclass(frozen=True, kw_only=True)
class Answering(Asked):
    """How it answers."""

    max_tokens: int | None = None
    """Longest answer, in tokens (default: that of the training; 128 if it is not known)."""
    max_length: int | None = None
    """Longest prompt, in tokens (default: that of the training; 512 if it is not known)."""
    temperature: float = 0.0
    """0 is greedy; above it, tokens are sampled."""
    system: str | None = None
    """A system prompt (default: the one that the model was trained with; "" is none)."""
    chat: bool | None = None
    """Whether questions go through the chat template (default: as in the training)."""
    seed: int = 42
    """Of sampled tokens."""


@dataclass(frozen=True, kw_only=True)
class AskOptions(ModelOptions, Answering):
    """Which model is asked, how it answers, and how it is loaded. Options of a command go before these in --help."""

    dtype: Dtype = "auto"
    """Weights' dtype; auto takes a run's own, or the faster of float32 and bfloat16 on this machine."""


@dataclass(frozen=True)
class Subject:
    """A model that is asked.

    Attributes:
        label: ``before`` or ``after`` for a run's, else what was typed.
        model: as :func:`eggroll.llm.load` takes it.
        dtype, quantize, revision: how it is loaded.
    """

    label: str
    model: str
    dtype: Any
    quantize: Any
    revision: str | None = None


def subjects(options: AskOptions, command: str, labels: tuple[str, ...]) -> tuple[list[Subject], EggrollConfig]:
    """The models that are asked and the settings that they answer with; nothing is loaded.

    Args:
        options: of the command line.
        command: the command's name, for messages.
        labels: what is asked of a run: ``before``, ``after``, or both. Empty: both, or the model.

    Raises:
        ConfigError: settings that cannot work, or ``before`` of something that is no run.
        RunError: a run that has no such model, or that needs code that is not trusted.
    """
    from eggroll.llm.models.export import settings_of

    run = run_at(options.model)
    if run is None:
        if BEFORE in labels:
            raise ConfigError(
                f"--only before asks the model that a run started from, and {options.model} is not a run's directory"
            )
        known = settings_of(Path(options.model).expanduser())
        found = [Subject(options.model, options.model, options.dtype, options.quantize, options.revision)]
        return found, _config(options, known, command)
    wanted = labels or (BEFORE, AFTER)
    trained = _options_of(run, options, command)
    dtype = trained.dtype if options.dtype == "auto" else options.dtype
    found = []
    if BEFORE in wanted:
        quantize = trained.quantize if options.quantize == "auto" else options.quantize
        found.append(Subject(BEFORE, trained.model, dtype, quantize, options.revision or trained.revision))
    if AFTER in wanted:
        found.append(Subject(AFTER, _result_of(run, command), dtype, options.quantize))
    known = {name: getattr(trained, name) for name in ("system", "chat", "max_tokens", "max_length")}
    return found, _config(options, known, command)


def run_at(place: str) -> RunDir | None:
    """The run in a directory; ``None`` for what is a model.

    Raises:
        RunError: there is a run, but it cannot be read; or a name in a folder of runs that is none of them.
    """
    from eggroll.run.run_dir import RunDir

    path = Path(place).expanduser()
    if not path.exists() and any(path.parent.glob(f"*/{name}") for name in MARKS if path.parent != Path()):
        return RunDir.open(path)  # which says what runs there are
    return RunDir.open(path) if any((path / name).is_file() for name in MARKS) else None


def writer(subject: Subject, config: EggrollConfig, options: AskOptions, console: Console) -> Writer:
    """Load a model, so that it can answer.

    Raises:
        ModelError: it cannot be loaded.
    """
    from eggroll.llm.generation.defaults import GenerationDefaults
    from eggroll.llm.measure.answers import Writer
    from eggroll.llm.models import loading

    with console.status(f"loading {escape(subject.model)} ..."):
        try:
            loaded = loading.load(
                subject.model, dtype=subject.dtype, device=options.device, quantize=subject.quantize,
                trust_remote_code=options.trust_remote_code, revision=subject.revision,
                attn_implementation=options.attn_implementation,
            )  # fmt: skip
        except ModelError as error:
            if subject.label == BEFORE:
                error.add_note("the run started from this model; to ask the trained one alone, add --only after")
            raise
        made = Writer(loaded, config)
    for note in GenerationDefaults.of(loaded.model.generation_config, config.temperature).notes():
        console.print(f"[dim]{escape(subject.label)}: {escape(note)}[/]")
    return made


def check_output(path: Path, example: str) -> None:
    """Find out before the work, not after it, that there is no place for its results.

    Args:
        path: the file that shall be written.
        example: a name for it, for the message.

    Raises:
        ConfigError: it is a directory, or its directory does not exist.
    """
    if path.is_dir():
        raise ConfigError(f"--output {path} is a directory; give the name of a file in it, such as {path / example}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: the directory {path.absolute().parent} does not exist")


def _options_of(run: RunDir, options: AskOptions, command: str) -> Any:
    """What a run was trained with. No code is taken from its directory, and no reward is loaded."""
    from eggroll.lifecycle import kind_name, options_of_run
    from eggroll.lifecycle.trust import without_reward
    from eggroll.llm.kind import KIND

    name = kind_name(run.config)
    if name != KIND.name:
        what = f"of eggroll {name}" if name else "that no command started"
        raise RunError(f"{run.path} is a run {what}; eggroll {command} asks a language model, or a run of eggroll tune")
    words = f"{typed()} {command} {shlex.quote(options.model)}"
    trained = options_of_run(KIND, run.path)
    return without_reward(trained, words, trust_remote_code=options.trust_remote_code)


def _result_of(run: RunDir, command: str) -> str:
    """The directory of the model that a run has left."""
    from eggroll.run.files import check_tree
    from eggroll.run.run_dir import MODEL

    place = run.path / MODEL
    check_tree(place)
    if not place.is_dir():
        rebuilt, quoted = shlex.quote(str(run.path / "so-far")), shlex.quote(str(run.path))
        raise RunError(
            f"{run.path} has no model yet: it is written when the run ends. Rebuild the weights as they are now and "
            f"ask these: {typed()} replay {quoted} -o {rebuilt} && {typed()} {command} {rebuilt}; or ask the model "
            "that it started from: --only before"
        )
    return str(place)


def _config(options: AskOptions, known: dict[str, Any], command: str) -> EggrollConfig:
    given = {name: getattr(options, name) for name in ("system", "chat", "max_tokens", "max_length")}
    values = {**known, **{name: value for name, value in given.items() if value is not None}}
    values = {name: value for name, value in values.items() if name in given and value is not None}
    try:
        return EggrollConfig(**values, temperature=options.temperature, seed=options.seed)
    except ConfigError as error:
        raise type(error)(str(error).replace("EggrollConfig", f"eggroll {command}", 1)) from None
