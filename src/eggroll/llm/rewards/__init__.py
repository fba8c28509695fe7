"""Rewards: what is made better. See :class:`eggroll.llm.rewards.base.Reward` for what each kind needs."""

from eggroll.llm.rewards.base import UNSCORED, Reward
from eggroll.llm.rewards.code import CodeExecutionReward
from eggroll.llm.rewards.custom import CustomReward
from eggroll.llm.rewards.functions import FunctionReward
from eggroll.llm.rewards.judge import JudgeReward
from eggroll.llm.rewards.load import as_reward, load_reward
from eggroll.llm.rewards.multi import MultiReward
from eggroll.llm.rewards.perplexity import PerplexityReward
from eggroll.llm.rewards.text import TextReward

__all__ = [
    "UNSCORED",
    "CodeExecutionReward",
    "CustomReward",
    "FunctionReward",
    "JudgeReward",
    "MultiReward",
    "PerplexityReward",
    "Reward",
    "TextReward",
    "as_reward",
    "load_reward",
]
