"""vLLM as the engine of a run: see :class:`VllmEggrollTrainer`."""

from eggroll.llm.vllm_trainer import VllmEggrollTrainer

__all__ = ["VllmEggrollTrainer"]
