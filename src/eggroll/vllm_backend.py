"""vLLM as the engine of a run: its own weights are evolved in place, its members are adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from eggroll.errors import RunError
from eggroll.llm.backends.build import WorkerFactory
from eggroll.llm.backends.torch import replica_for
from eggroll.llm.config import EggrollConfig
from eggroll.llm.models.adapter import AdapterReport, save_adapter
from eggroll.llm.models.export import save_pretrained
from eggroll.llm.trainer import EggrollTrainer

__all__ = ["VllmEggrollTrainer"]


class VllmEggrollTrainer(EggrollTrainer):
    """``EggrollTrainer.from_model_id(..., backend="vllm")`` under the name that it has elsewhere, and its adapters.

    ::

        trainer = VllmEggrollTrainer("Qwen/Qwen2.5-0.5B-Instruct", EggrollConfig(population_size=128), reward_fn)
        history = trainer.evolve(prompts=["What is 2+2?", "Explain gravity."])
        trainer.save_best_adapter("./evolved-adapter")
        trainer.cleanup()

    Only matrices of linear layers are evolved, since members are LoRA adapters. The engine runs in this process, unless
    ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` is set (scripts then need ``if __name__ == "__main__":``).

    Args:
        model_id: a directory, hub id, or an alias such as ``smollm2-135m``.
        config: the settings.
        reward_fn: ``reward_fn(outputs, prompts) -> list[float]``, TRL's ``reward(prompts, completions, **columns)``,
            ``score(text) -> float``, or a reward of text.
        dtype: of the weights, as for :func:`eggroll.llm.load`.
        engine_args: further arguments of ``vllm.LLM``, such as ``{"tensor_parallel_size": 2}``.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: the settings or the reward do not fit vLLM; nothing has been loaded then.
        MissingExtraError: vLLM is not installed.
        MemoryBudgetError, ModelError: the engine does not start.
    """

    def __init__(
        self,
        model_id: str,
        config: EggrollConfig,
        reward_fn: Any,
        *,
        dtype: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        worker = WorkerFactory(
            model=model_id, config=config, reward=reward_fn, backend="vllm", dtype=dtype,
            engine_args=engine_args or {}, trust_remote_code=trust_remote_code,
        )()  # fmt: skip
        self._hold(worker)
        self.engine: Any = worker.learner
        self._evaluator: Any = worker.evaluator

    def evolve(self, data: Any = None, *arguments: Any, prompts: Any = None, **options: Any) -> list[dict[str, Any]]:
        """As :meth:`EggrollTrainer.evolve`; ``prompts=`` is another name of ``data``."""
        return super().evolve(prompts if data is None else data, *arguments, **options)

    def save_best_adapter(
        self,
        directory: str | Path,
        *,
        of: Literal["center", "member"] = "center",
        rank: int | None = None,
        merged: bool = True,
    ) -> AdapterReport:
        """Write what was learned as a PEFT adapter of the model that the run began with.

        The sum of many updates has a high rank, so an adapter of rank ``rank`` is an approximation: the truncated
        singular value decomposition of the change of each matrix, with the error it makes in the report and in
        ``eggroll.json``. The merged model in ``directory/merged`` has no such error.

        Args:
            directory: where to; ``PeftModel.from_pretrained`` and vLLM's ``LoRARequest`` load it.
            of: ``center``, which is what evolution improves; or ``member``, the one with the best score of all
                generations, which owes much of its score to luck. Its weights are rebuilt on the CPU from the log of
                updates up to its generation.
            rank: of the adapter; ``None`` takes 16 times the rank of the perturbations, at most 256.
            merged: whether the merged model is written too.

        Returns:
            The rank and the relative error of the adapter, ``|change - adapter| / |change|`` (Frobenius).

        Raises:
            RunError: nothing was learned yet.
        """
        if self.done == 0:
            raise RunError("there is nothing to save: no generation has been run; call evolve(prompts=...) first")
        setup = self.worker.setup
        model = self._best_member() if of == "member" else self.worker.model()
        about: dict[str, Any] = {
            "base_model": setup.base,
            "of": of,
            "generations": self.done,
            "reward": self.reward.name,
        }
        about["config"] = self.config.to_dict()
        if merged:
            save_pretrained(model, self.tokenizer, Path(directory) / "merged", metadata=about)
        before, after = dict(setup.load_base().named_parameters()), dict(model.named_parameters())
        changes = {spec.name: after[spec.name].float() - before[spec.name].float() for spec in setup.specs}
        wanted = min(256, 16 * self.config.rank) if rank is None else rank
        return save_adapter(changes, directory, rank=wanted, base_model=str(setup.base), metadata=about)

    @torch.no_grad()
    def _best_member(self) -> Any:
        """The member with the best score, in PyTorch on the CPU: the center of its generation and its perturbation."""
        best, records = self._evaluator.best, self.engine.records
        if best is None or len(records) < self.done:
            raise RunError(
                "the best member is not known: this trainer has not evaluated its generation. Use of='center'"
            )
        replica = replica_for(self.worker.setup.load_base(), self.config)
        for record in records[: best.generation]:
            replica.apply(record)
        population = replica.population
        with population.member(best.generation, best.member, sigma=best.sigma) as model:
            values: dict[str, Any] = dict(model.named_parameters())
            dense = {spec.name: values[spec.name].dense() for spec in population.specs}
        for name, weight in dense.items():
            population.parameter(name).copy_(weight)
        return replica.model
