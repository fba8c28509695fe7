"""A run of ``eggroll tune``: its data, its reward, its worker, and the model that it leaves."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from eggroll._command import typed
from eggroll.core.settings import narrowed
from eggroll.errors import ConfigError, DataError, EggrollError
from eggroll.lifecycle import Plan, RunKind, Saved, Sitting
from eggroll.lifecycle.kind import Progress
from eggroll.llm.backends.build import WorkerFactory, with_population
from eggroll.llm.backends.worker import LanguageWorker, ModelWorker
from eggroll.llm.choosing.auto import automatic, with_stand_ins
from eggroll.llm.choosing.choose import CHOSEN, CalibrationWarning, Choice, check_auto, choose, seconds_left
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, check_source, load_examples
from eggroll.llm.data.fingerprint import data_fingerprint
from eggroll.llm.judging import criteria_fingerprint, reward_of
from eggroll.llm.models.export import answer_lines, load_line, save_pretrained
from eggroll.llm.models.fingerprint import model_fingerprint
from eggroll.llm.models.locate import check_place
from eggroll.llm.models.push import check_push
from eggroll.llm.options import TuneOptions
from eggroll.llm.rewards import Reward
from eggroll.llm.rewards.columns import check_columns
from eggroll.llm.rewards.load import as_reward
from eggroll.llm.tasks import check_trainable, get_task, row_check
from eggroll.llm.trainer import SPREAD_ADVICE, EggrollTrainer
from eggroll.llm.worlds.load import WorldSpec, rows_of
from eggroll.run.run_dir import MODEL as MODEL
from eggroll.run.run_dir import RunDir

DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"


def load_data(options: TuneOptions) -> tuple[list[Example], list[Example] | None, list[str]]:
    """Training data, held-out data, and what was chosen.

    Raises:
        ConfigError: two sources are given.
        DataError: data cannot be read.
    """
    if options.dataset is not None and options.prompts is not None:
        raise ConfigError("--dataset and --prompts mean the same; give one of them")
    source = options.dataset or options.prompts
    if options.task is not None:
        task = get_task(options.task, shots=options.shots)
        train = load_examples(task.train) if source is None else _load(source, options)
        if options.eval_prompts is None:
            return train, load_examples(task.heldout), []
        return train, _load(options.eval_prompts, options), []
    heldout = None if options.eval_prompts is None else _load(options.eval_prompts, options)
    if options.world is not None and source is None:
        own, watched = rows_of(options.world)
        watched = watched if heldout is None else None
        held = heldout if watched is None else load_examples(watched, purpose="worlds")
        return load_examples(own, purpose="worlds"), held, []
    answers = options.judge_url is not None or options.reward not in (None, "perplexity")
    if source is not None or not answers:
        return _load(source or DEFAULT_DATASET, options), heldout, []
    try:
        train = _load(DEFAULT_DATASET, options)
    except DataError as error:
        what = f"--reward {options.reward}" if options.reward else "--judge-url"
        raise DataError(
            f"{what} needs prompts to answer: give --prompts with a .jsonl or .txt file, a "
            f"folder or a hub id. Without it wikitext-2 would be taken, but {error}"
        ) from error
    return train, heldout, ["no --prompts given: the lines of wikitext-2 are the prompts"]


def _load(source: str, options: TuneOptions) -> list[Example]:
    check = row_check(options.task or options.reward)
    if options.world is not None:
        return load_examples(source, purpose="worlds", check=check)
    is_text = options.reward in (None, "perplexity") and options.task is None and options.judge_url is None
    return load_examples(source, purpose="text" if is_text else "prompts", check=check)


def scored_by(options: TuneOptions) -> Any:
    """What scores a run, for :func:`~eggroll.llm.rewards.load.as_reward`; ``None`` if nothing is named."""
    judged = options.judge_url is not None or options.judge_model is not None
    named = reward_of(options) if judged else options.reward or options.task
    return named if options.world is None else WorldSpec(options.world, named)


def _check_shots(options: TuneOptions) -> None:
    """Refuse worked examples of no task, or of a task whose problems are not what is read."""
    if options.task is None and options.shots:
        raise ConfigError(f"--shots {options.shots} needs a --task whose worked examples are shown; none is given")
    for given in ("dataset", "prompts", "eval_prompts"):
        if options.shots and (file := getattr(options, given)) is not None:
            raise ConfigError(
                f"--shots {options.shots} shows worked examples before the task's own problems, and --"
                f"{given.replace('_', '-')} {file} takes their place as it is: training and held-out prompts would "
                "differ. Leave one of the two out, or write the examples into the file's conversations"
            )


def look(options: TuneOptions) -> Reward:
    """The reward, and whether the model and the data are there; nothing else is loaded or fetched.

    Raises:
        ConfigError: no reward is given, or several things are not there: the message lists all of them.
        EggrollError: one of them is not there, or the reward cannot be loaded.
    """
    check_trainable(options.task)
    _check_shots(options)
    judged = options.judge_url or options.judge_model
    if not (options.reward or options.task or options.world or judged or options.resume):
        raise ConfigError(
            'eggroll tune needs --reward, which says what is scored: a .py file, "lambda text: ..." or '
            "package.module:function for what the model writes, perplexity for how likely it finds the texts of "
            "--dataset; or --task NAME, which brings a reward and prompts; or --judge-url, a model that grades; or "
            "--world FILE.py:Class, which the model talks to"
        )
    sources = [source for source in (options.dataset, options.prompts, options.eval_prompts) if source is not None]
    found: list[Any] = []
    problems: list[EggrollError] = []
    looks: list[Callable[[], Any]] = [
        lambda: as_reward(scored_by(options) or "perplexity", None),
        partial(check_place, options.model, options.revision),
        *(partial(check_source, source) for source in sources),
        *([partial(check_push, options.hub_model_id)] if options.push_to_hub else []),
    ]
    for one in looks:
        try:
            found.append(one())
        except EggrollError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError.from_problems("eggroll tune", [str(problem) for problem in problems])
    reward: Reward = found[0]
    return reward


def make_worker(options: TuneOptions, reward: Reward | None = None) -> ModelWorker:
    """The worker of a run: in this process, with a vLLM engine, or a pool of workers; it is not told its data yet.

    A reward that is loaded already stays in this process: workers elsewhere load what the options name.

    Raises:
        EggrollError: the model, the reward or the engine cannot be had, or do not fit each other.
    """
    placement: dict[str, Any] = {}
    if options.workers is not None:
        placement = {
            "address": options.ray_address, "cpus_per_worker": options.worker_cpus,
            "gpus_per_worker": options.worker_gpus,
        }  # fmt: skip
    trainer = EggrollTrainer.from_model_id(
        options.model,
        narrowed(options, EggrollConfig),
        reward if reward is not None and options.workers is None else scored_by(options) or "perplexity",
        backend=options.backend,
        workers=options.workers,
        dtype=options.dtype,
        device=options.device,
        engine_args=engine_args(options),
        trust_remote_code=options.trust_remote_code,
        quantize=options.quantize,
        revision=options.revision,
        attn_implementation=options.attn_implementation,
        **placement,
    )
    return trainer.worker


def engine_args(options: TuneOptions) -> dict[str, Any]:
    """``--engine-args`` as a dict.

    Raises:
        ConfigError: it is no JSON object, or the run is not on vLLM.
    """
    if options.engine_args is None:
        return {}
    if options.backend != "vllm":
        raise ConfigError("--engine-args are arguments of vllm.LLM; they need --backend vllm")
    try:
        values = json.loads(options.engine_args)
    except ValueError as error:
        values, reason = None, f": {error}"
    else:
        reason = f", it is a {type(values).__name__}"
    if not isinstance(values, dict):
        raise ConfigError(
            f"--engine-args (={options.engine_args!r}) must be a JSON object{reason}; "
            'for example --engine-args \'{"max_loras": 16, "tensor_parallel_size": 2}\''
        )
    return values


def _plan(options: TuneOptions) -> Plan:
    reward = look(options)
    train, heldout, notes = load_data(options)
    check_columns(reward, train)
    check_columns(reward, heldout or train, "the held-out data set")
    engine_args(options)
    check_auto(options)
    worker = make_worker(with_stand_ins(options), reward)
    worker.use(train, heldout)
    data = Data(reward, train, heldout, notes, _fingerprints(options, train, heldout))
    if options.resume is not None or not (automatic(options) or options.minutes):
        return _planned(options, worker, data)
    return dataclasses.replace(
        _planned(with_stand_ins(options), worker, data), choose=partial(_chosen, options, worker, data)
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads, and what is to be said about it."""

    reward: Reward
    train: list[Example]
    heldout: list[Example] | None
    notes: list[str]
    fingerprints: dict[str, str]


def _chosen(
    options: TuneOptions, worker: ModelWorker, data: Data, notify: Callable[[str], None], progress: Progress
) -> Plan:
    """The plan with what was measured on ``worker``."""
    try:
        heldout = len(data.heldout or ())
        choice = choose(options, worker, prompts=len(data.train), heldout=heldout, notify=notify, progress=progress)
        config, before = narrowed(choice.options, EggrollConfig), worker.setup.config
        sizes = ("population_size", "prompts_per_generation")
        if any(getattr(config, name) != getattr(before, name) for name in sizes):
            worker = with_population(worker, config)
            worker.use(data.train, data.heldout)
        worker.settle(config)
    except BaseException:  # nobody else knows of this worker yet
        worker.close()
        raise
    if choice.warning:
        warnings.warn(choice.warning, CalibrationWarning, stacklevel=2)
    return _planned(choice.options, worker, data, choice)


def _planned(options: TuneOptions, worker: ModelWorker, data: Data, choice: Choice | None = None) -> Plan:
    train, heldout = data.train, data.heldout
    # What was chosen automatically is part of the run from now on, so that it is the same when resumed.
    options = dataclasses.replace(options, dtype=worker.setup.dtype_name)  # type: ignore[arg-type]
    chosen = () if choice is None else choice.lines
    what = options.task or options.reward or options.world or ("judge" if options.judge_url else "perplexity")
    stem = "lambda" if what.startswith("lambda") else Path(what).stem

    def finish(worker: ModelWorker, run: RunDir, sitting: Sitting) -> dict[str, Any]:
        worker.save(run.folder(MODEL), {"base_model": options.model, **sitting.kept.about()})
        return {}

    return Plan(
        options=options,
        config=worker.setup.config,
        make_worker=lambda: worker,
        finish=finish,
        title=f"{Path(options.model).name} on {what}",
        name=re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(options.model).name}-{stem}").strip("-").lower(),
        heldout=heldout is not None,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        describe=lambda worker: _describe(worker, len(train), data.notes, chosen),
        command=f"{typed()} tune {shlex.quote(options.model)}",
        facts={
            "model": options.model,
            "device": worker.setup.place,
            **({} if choice is None else {CHOSEN: choice.record()}),
        },
        seconds=seconds_left(options, choice),
        fingerprints=data.fingerprints,
        pools_itself=True,
        spread_advice=SPREAD_ADVICE,
        finish_interrupted=True,
    )


def _fingerprints(options: TuneOptions, train: list[Example], heldout: list[Example] | None) -> dict[str, str]:
    model = model_fingerprint(options.model, options.revision)
    return {
        "data_fingerprint": data_fingerprint(train),
        **({} if heldout is None else {"heldout_data_fingerprint": data_fingerprint(heldout)}),
        **({} if model is None else {"model_fingerprint": model}),
        **criteria_fingerprint(options),
    }


def _describe(worker: ModelWorker, prompts: int, notes: Sequence[str], chosen: Sequence[str]) -> list[str]:
    setup = worker.setup
    config, evolved = setup.config, sum(spec.size for spec in setup.specs)
    texts = setup.reward.reads == "text"
    each = min(config.prompts_per_generation, prompts)
    slow = [worker.note] if worker.note else []
    expected = worker.expectation() if isinstance(worker, LanguageWorker) else ""
    return [
        *notes,
        f"[bold]{escape(setup.name)}[/]  {count(setup.parameters)} parameters, {count(evolved)} evolved in "
        f"{len(setup.specs)} tensors, {setup.dtype_name} on {setup.place}",
        f"reward {escape(setup.reward.name)}, {prompts} {'texts' if texts else 'prompts'}, {each} a generation",
        f"population {config.population_size} ({config.sampling}), rank {config.rank}, sigma {config.sigma:g}, "
        f"lr {config.lr:g}, {config.optimizer}, seed {config.seed}",
        *(f"chosen: {escape(line)}" for line in chosen),
        *(
            f"[dim]{escape(note)}[/]"
            for note in (*setup.notes, *setup.generation, *setup.reward.notes, *slow, *filter(None, [expected]))
        ),
    ]


def count(parameters: int) -> str:
    """A number of parameters as people say it: 860, 12.3 k, 134.5 M, 8.03 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.4g} {unit}"
    return str(parameters)


def _base(options: TuneOptions, run: RunDir) -> ModelWorker:
    return WorkerFactory(
        model=options.model, config=narrowed(options, EggrollConfig), reward=lambda text: 0.0, dtype=options.dtype,
        trust_remote_code=options.trust_remote_code, quantize=options.quantize, revision=options.revision,
    )()  # fmt: skip


def _save(worker: ModelWorker, directory: Path, generation: int) -> Saved:
    about = {"config": worker.setup.config.to_dict(), "replayed_generations": generation}
    save_pretrained(worker.model(), worker.setup.tokenizer, directory, metadata=about)
    return Saved("model", directory, [load_line(directory)])


def _load_line(run: RunDir) -> str | None:
    return answer_lines(run.path / MODEL) if (run.path / MODEL).exists() else None


KIND = RunKind(name="tune", options=TuneOptions, plan=_plan, base=_base, save=_save, load_line=_load_line)
