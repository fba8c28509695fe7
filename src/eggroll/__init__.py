"""EGGROLL: train any model on any score, without gradients (arXiv 2511.16652).

Public names are loaded on first use: ``import eggroll`` itself loads neither torch nor jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eggroll._lazy import attach

if TYPE_CHECKING:
    from eggroll.core.config import ESConfig as ESConfig
    from eggroll.llm.config import EggrollConfig as EggrollConfig
    from eggroll.llm.rewards import CodeExecutionReward as CodeExecutionReward
    from eggroll.llm.rewards import CustomReward as CustomReward
    from eggroll.llm.rewards import FunctionReward as FunctionReward
    from eggroll.llm.rewards import MultiReward as MultiReward
    from eggroll.llm.rewards import PerplexityReward as PerplexityReward
    from eggroll.llm.rewards import TextReward as TextReward
    from eggroll.llm.trainer import EggrollTrainer as EggrollTrainer

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CodeExecutionReward": "eggroll.llm.rewards",
        "CustomReward": "eggroll.llm.rewards",
        "ESConfig": "eggroll.core.config",
        "EggrollConfig": "eggroll.llm.config",
        "EggrollTrainer": "eggroll.llm.trainer",
        "FunctionReward": "eggroll.llm.rewards",
        "MultiReward": "eggroll.llm.rewards",
        "PerplexityReward": "eggroll.llm.rewards",
        "TextReward": "eggroll.llm.rewards",
    },
    extra="llm",
    eager=("__version__",),
)
