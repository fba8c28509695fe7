"""Language models: load one, say what a good answer is, and evolve it.

    loaded = load("smollm2-135m")
    task = get_task("countdown")
    trainer = EggrollTrainer(loaded.model, EggrollConfig(population_size=32), task.reward, loaded.tokenizer)
    trainer.evolve(task.train)
    trainer.save("./evolved-model")

Public names are loaded on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eggroll._lazy import attach

if TYPE_CHECKING:
    from eggroll.llm.config import EggrollConfig as EggrollConfig
    from eggroll.llm.data.examples import Example as Example
    from eggroll.llm.data.examples import load_examples as load_examples
    from eggroll.llm.models.loading import LoadedModel as LoadedModel
    from eggroll.llm.models.loading import load as load
    from eggroll.llm.rewards import CodeExecutionReward as CodeExecutionReward
    from eggroll.llm.rewards import CustomReward as CustomReward
    from eggroll.llm.rewards import FunctionReward as FunctionReward
    from eggroll.llm.rewards import JudgeReward as JudgeReward
    from eggroll.llm.rewards import MultiReward as MultiReward
    from eggroll.llm.rewards import PerplexityReward as PerplexityReward
    from eggroll.llm.rewards import Reward as Reward
    from eggroll.llm.rewards import TextReward as TextReward
    from eggroll.llm.tasks import Task as Task
    from eggroll.llm.tasks import get_task as get_task
    from eggroll.llm.trainer import EggrollTrainer as EggrollTrainer
    from eggroll.llm.worlds.reward import WorldReward as WorldReward
    from eggroll.llm.worlds.world import Turn as Turn
    from eggroll.llm.worlds.world import World as World

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CodeExecutionReward": "eggroll.llm.rewards",
        "CustomReward": "eggroll.llm.rewards",
        "EggrollConfig": "eggroll.llm.config",
        "EggrollTrainer": "eggroll.llm.trainer",
        "Example": "eggroll.llm.data.examples",
        "FunctionReward": "eggroll.llm.rewards",
        "JudgeReward": "eggroll.llm.rewards",
        "LoadedModel": "eggroll.llm.models.loading",
        "MultiReward": "eggroll.llm.rewards",
        "PerplexityReward": "eggroll.llm.rewards",
        "Reward": "eggroll.llm.rewards",
        "Task": "eggroll.llm.tasks",
        "TextReward": "eggroll.llm.rewards",
        "Turn": "eggroll.llm.worlds.world",
        "World": "eggroll.llm.worlds.world",
        "WorldReward": "eggroll.llm.worlds.reward",
        "get_task": "eggroll.llm.tasks",
        "load": "eggroll.llm.models.loading",
        "load_examples": "eggroll.llm.data.examples",
    },
    extra="llm",
)
