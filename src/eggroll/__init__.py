"""EGGROLL: train any model on any score, without gradients (arXiv 2511.16652).

Public names are loaded on first use: ``import eggroll`` itself loads neither torch nor jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eggroll.llm.config import EggrollConfig as EggrollConfig
    from eggroll.llm.rewards import CodeExecutionReward as CodeExecutionReward
    from eggroll.llm.rewards import CustomReward as CustomReward
    from eggroll.llm.rewards import FunctionReward as FunctionReward
    from eggroll.llm.rewards import MultiReward as MultiReward
    from eggroll.llm.rewards import PerplexityReward as PerplexityReward
    from eggroll.llm.rewards import TextReward as TextReward
    from eggroll.llm.trainer import EggrollTrainer as EggrollTrainer

__version__ = "0.1.0"

_HOMES = {
    "CodeExecutionReward": "eggroll.llm.rewards",
    "CustomReward": "eggroll.llm.rewards",
    "EggrollConfig": "eggroll.llm.config",
    "EggrollTrainer": "eggroll.llm.trainer",
    "FunctionReward": "eggroll.llm.rewards",
    "MultiReward": "eggroll.llm.rewards",
    "PerplexityReward": "eggroll.llm.rewards",
    "TextReward": "eggroll.llm.rewards",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eggroll' has no attribute {name!r}")
    home = _HOMES[name]
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "eggroll":
            raise
        from eggroll.errors import MissingExtraError

        raise MissingExtraError(
            f"eggroll.{name} needs '{error.name}', which is not installed. "
            "Install it with: pip install 'eggroll-es[llm]'"
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
