"""One training run of one method in a process of its own: EGGROLL, or TRL's GRPO.

    python benchmarks/grpo/one_run.py --method grpo --setting '{"learning_rate": 2e-5}' --minutes 5 --out run.json

Both get the same model, the same prompts as strings (so the same tokens), the same reward function, and a clock that
stands still while the model is measured. It is measured by the same function, greedily, on problems that are in
nobody's training set. Learning rates are constant, so a curve says what a run of any shorter time would have reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eggroll import llm
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import load_examples
from eggroll.llm.generation.chat import format_prompts
from eggroll.llm.measure.evaluate import evaluate
from eggroll.llm.models.loading import LoadedModel
from eggroll.llm.tasks import Task, get_task

METHODS = ("eggroll", "grpo")


class Clock:
    """The time spent on training, and the model's score at given times of it.

    ``tick(steps)`` is called after every step, ``measure() -> score and samples`` is not on the clock; ``tick`` answers
    whether there is time left. ``now`` is wall time, or for one thread of a CPU that thread's time, which is what the
    wall time would be on an idle core, so that runs can share a machine without being disturbed by it.
    """

    def __init__(
        self, seconds: float, looks: int, measure: Callable[[], dict[str, Any]], now: Callable[[], float]
    ) -> None:
        self.seconds, self.measure, self.now = seconds, measure, now
        self.times = [seconds * i / looks for i in range(1, looks + 1)] if looks else []
        self.curve: list[dict[str, Any]] = []
        self.paused, self.steps = 0.0, 0
        self.began = now()

    def spent(self) -> float:
        return self.now() - self.began - self.paused

    def tick(self, steps: int) -> bool:
        spent, self.steps = self.spent(), steps
        if self.times and spent >= self.times[0]:
            self.look(spent)
            self.times = [t for t in self.times if t > spent]
        return spent < self.seconds

    def look(self, spent: float) -> None:
        start = self.now()
        found = self.measure()
        self.curve.append({"seconds": round(spent, 1), "steps": self.steps, **found})
        print(json.dumps({key: value for key, value in self.curve[-1].items() if key != "samples"}), flush=True)
        self.paused += self.now() - start


def prepared(name: str, shots: int, tokenizer: Any) -> Task:
    """The task with its prompts as the text that the model reads."""
    task = get_task(name, shots=shots)

    def texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made = format_prompts(tokenizer, [row["prompt"] for row in rows], system=task.system)
        return [{**row, "prompt": text} for row, text in zip(rows, made, strict=True)]

    return dataclasses.replace(
        task, **{split: texts(getattr(task, split)) for split in ("train", "validation", "heldout")}
    )


def measuring(loaded: LoadedModel, task: Task, split: str, max_tokens: int) -> Callable[[], dict[str, Any]]:
    """The mean reward of greedy answers to a split, how many are right, and a few of them."""
    problems = load_examples(getattr(task, split))
    config = EggrollConfig(max_tokens=max_tokens, chat=False)

    def measure() -> dict[str, Any]:
        result = evaluate(loaded, task, problems, config, batch_size=32)
        formed = sum(score >= 0.1 - 1e-9 for score in result.scores)
        count = len(result.scores)
        samples = [[text, score] for text, score in zip(result.completions[:3], result.scores, strict=False)]
        return {"reward": sum(result.scores) / count, "right": result.right / count, "format": formed / count,
                "samples": samples}  # fmt: skip

    return measure


def run_eggroll(args: argparse.Namespace, loaded: LoadedModel, task: Task, measure: Any) -> dict[str, Any]:
    from eggroll import EggrollTrainer

    settings = {"population_size": 16, "prompts_per_generation": 4, "rank": 1, "sigma": 0.01, "lr": 0.001}
    config = EggrollConfig(
        **{**settings, **args.setting}, generations=100_000, max_tokens=args.max_tokens, chat=False, eval_every=0,
        checkpoint_every=0, seed=args.seed,
    )  # fmt: skip
    trainer = EggrollTrainer(loaded.model, config, task.reward, loaded.tokenizer)
    clock = Clock(60 * args.minutes, args.looks, measure, args.now)
    clock.look(0.0)
    trainer.evolve(task.train, lambda metrics: clock.tick(int(metrics["generation"])))
    rows = clock.steps * config.population_size * config.prompts_per_generation
    return {**closing(clock, rows), "train_reward": [round(m["fitness_mean"], 4) for m in trainer.history]}


def run_grpo(args: argparse.Namespace, loaded: LoadedModel, task: Task, measure: Any) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = {"learning_rate": 1e-5, "num_generations": 8, "per_device_train_batch_size": 16}
    config = GRPOConfig(
        **{**settings, **args.setting}, output_dir=str(args.out.with_suffix(".trl")), max_steps=100_000,
        max_completion_length=args.max_tokens, temperature=1.0, lr_scheduler_type="constant",
        use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, seed=args.seed,
    )  # fmt: skip
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(True)
    rows = [{key: row[key] for key in ("prompt", "numbers", "target")} for row in task.train]

    class Watch(TrainerCallback):  # type: ignore[misc]
        clock: Clock

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock = Clock(60 * args.minutes, args.looks, guarded, args.now)
            self.clock.look(0.0)

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            if not self.clock.tick(state.global_step):
                control.should_training_stop = True

    def guarded() -> dict[str, Any]:
        training = loaded.model.training
        loaded.model.eval()
        try:
            return measure()
        finally:
            loaded.model.train(training)

    watch = Watch()
    trainer = GRPOTrainer(
        model=loaded.model, reward_funcs=task.reward, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer, callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    log = [round(entry["reward"], 4) for entry in trainer.state.log_history if "reward" in entry]
    clock = watch.clock
    return {**closing(clock, clock.steps * config.generation_batch_size), "train_reward": log}


def closing(clock: Clock, rows: int) -> dict[str, Any]:
    """What a run ends with; the score at its end if the last look was before."""
    spent = clock.spent()
    if clock.curve[-1]["steps"] < clock.steps:
        clock.look(spent)
    return {"seconds": round(spent, 1), "steps": clock.steps, "completions": rows, "curve": clock.curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--setting", type=json.loads, default={}, help="JSON: fields of EggrollConfig or GRPOConfig")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, without the measurements")
    parser.add_argument("--looks", type=int, default=1, help="measurements after the one at the start")
    parser.add_argument("--split", default="validation", choices=["validation", "heldout"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="countdown")
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="1: the time is that of this thread, not the wall's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    one_thread = args.device == "cpu" and torch.get_num_threads() == 1
    args.now = time.process_time if one_thread else time.perf_counter
    loaded = llm.load(args.model, dtype="float32", device=args.device)
    task = prepared(args.task, args.shots, loaded.tokenizer)
    measure = measuring(loaded, task, args.split, args.max_tokens)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident()
    result = (run_eggroll if args.method == "eggroll" else run_grpo)(args, loaded, task, measure)
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else resident()
    about = {key: value for key, value in vars(args).items() if key not in ("out", "now")}
    about["clock"] = "cpu" if one_thread else "wall"
    args.out.write_text(json.dumps({**about, **result, "mib_before": round(before), "mib_peak": round(peak)}, indent=1))


def resident() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
