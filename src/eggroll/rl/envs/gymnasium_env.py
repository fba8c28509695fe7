"""Gymnasium (https://gymnasium.farama.org): what a policy needs to know of an environment of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eggroll._optional import require
from eggroll.errors import ConfigError, RewardError
from eggroll.rl.envs import registry
from eggroll.rl.envs.base import ActionSpace
from eggroll.rl.envs.gymnasium_spaces import check_observations, policy_actions

DEFAULT_LIMIT = 1000
"""Steps of an episode where the environment has no limit of its own."""


@dataclasses.dataclass(frozen=True)
class GymnasiumEnvironment:
    """What the trainer asks of an environment; :mod:`eggroll.rl.gymnasium_rollouts` steps it, in batches."""

    name: str
    id: str
    obs_size: int
    actions: ActionSpace
    max_steps: int
    observation_space: Any
    action_space: Any

    @classmethod
    def make(cls, name: str) -> GymnasiumEnvironment:
        """The environment of an id.

        Raises:
            ConfigError: no such id, an environment that cannot be made, or observations or actions of a kind that
                policies cannot have.
        """
        gymnasium = require("gymnasium", extra="rl")
        _, id = registry.resolve(name)
        if "?" in name:
            raise ConfigError(
                f"env {name!r}: environments of gymnasium take no options here; register an id that has them: "
                'gymnasium.register(id="Mine-v0", entry_point=..., kwargs={...})'
            )
        try:
            env = gymnasium.make(id)
            observations, actions = env.observation_space, env.action_space
            limit = env.spec.max_episode_steps or DEFAULT_LIMIT
            env.close()
        except (Exception, SystemExit) as error:  # whatever an import or a constructor of someone else's may raise
            raise ConfigError(f"env {name!r}: gymnasium cannot make {id}: {_cause(error, id)}") from error
        size = check_observations(observations, name)
        return cls(f"gymnasium/{id}", id, size, policy_actions(actions, name), int(limit), observations, actions)

    def reset(self, key: Any) -> tuple[Any, Any]:
        """Not in JAX."""
        raise TypeError(f"{self.name} is stepped on the host")

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, Any, Any, Any]:
        """Not in JAX."""
        raise TypeError(f"{self.name} is stepped on the host")

    def render(self, states: list[Any], path: Path) -> Path | None:
        """Nothing: frames come from the environment itself."""
        return None


@contextmanager
def calling(env: GymnasiumEnvironment, method: str) -> Iterator[None]:
    """What an environment's own code raises, as an error that names the environment and where it was called."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise RewardError(f"{env.name}: {method} raised {_shown(error)}") from error


def _cause(error: BaseException, id: str) -> str:
    """Why an environment could not be made, in one sentence with a way out where there is one."""
    gymnasium = require("gymnasium", extra="rl")
    if isinstance(error, gymnasium.error.Error):
        return _one_line(error)
    module = id.partition(":")[0] if ":" in id else None
    if id.count(":") > 1:
        return "at most one colon, between a module and the id that it registers: module:Name-v0"
    if isinstance(error, ModuleNotFoundError):
        needed = f"no module named {error.name or _missing_module(error)!r}"
        if module is None:
            return f"it needs a module that is not installed: {needed}"
        return f"{needed}; {module!r} is imported for the id. Install it, or put its folder into PYTHONPATH"
    if isinstance(error, TypeError) and (
        found := re.search(r"missing \d+ required .*?arguments?: (.*?) was", str(error))
    ):
        return (
            f"its constructor needs {found[1]}. Register an id that gives what it needs: "
            'gymnasium.register(id="Mine-v0", entry_point=..., kwargs={...})'
        )
    return f"it raised {_shown(error)}"


def _missing_module(error: BaseException) -> str:
    found = re.search(r"No module named '(.+?)'", str(error))
    return found[1] if found else str(error)


def _shown(error: BaseException) -> str:
    text = _one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
