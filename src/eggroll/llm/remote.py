"""What trainers share whose weights live elsewhere: in an engine, or in workers on other machines."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from eggroll.core.select import ParameterSpec
from eggroll.llm.config import EggrollConfig
from eggroll.llm.models import loading
from eggroll.llm.models.export import save_pretrained
from eggroll.llm.models.outline import Found
from eggroll.llm.rewards import Reward
from eggroll.llm.trainer import EggrollTrainer


class RemoteTrainer(EggrollTrainer):
    """A trainer without a model of its own: ``learner`` gives the evolved weights when they are saved.

    Args:
        model_id: a directory, hub id or alias.
        found: what the model was looked up as.
        specs: the evolved parameters.
        config: the settings.
        reward: the reward.
        tokenizer: the model's tokenizer.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        model_id: str,
        found: Found,
        specs: list[ParameterSpec],
        config: EggrollConfig,
        reward: Reward,
        tokenizer: Any,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._begin(config, reward, tokenizer)
        self.model_id, self.found, self.specs = model_id, found, specs
        self.trust_remote_code = trust_remote_code

    @property
    def evolved(self) -> list[ParameterSpec]:
        """The parameters that are evolved."""
        return self.specs

    def save(self, directory: str | Path, *, metadata: dict[str, Any] | None = None) -> Path:
        """Write the evolved model as a plain Hugging Face directory that ``from_pretrained`` loads."""
        about = {"base_model": self.model_id, "generations": self.done, "reward": self.reward.name}
        about |= {"config": self.config.to_dict(), **(metadata or {})}
        return save_pretrained(self.merged(), self.tokenizer, directory, metadata=about)

    def load_base(self) -> Any:
        """The model that the run began with, in PyTorch on the CPU."""
        dtype = str(self.found.dtype).removeprefix("torch.")
        trust = self.trust_remote_code
        return loading.load(self.model_id, dtype=dtype, device="cpu", trust_remote_code=trust).model

    @torch.no_grad()
    def merged(self) -> Any:
        """The evolved model in PyTorch, on the CPU."""
        state = self.learner.state_tensors()
        model = self.load_base()
        parameters = dict(model.named_parameters())
        for spec in self.specs:
            parameters[spec.name].copy_(state[f"parameter/{spec.name}"])
        return model

    def cleanup(self) -> None:
        """Free the engine or the workers. The trainer cannot be used after that."""
        close = getattr(self.learner, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()
