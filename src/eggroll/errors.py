"""The errors that eggroll raises on purpose.

    EggrollError
    ├── ConfigError              also ValueError       a setting, or several together, cannot work
    │   └── SelectionError                             a parameter pattern matches nothing
    ├── DataError                also ValueError       a data set is missing, empty or of the wrong form
    ├── ModelError               also OSError          a model cannot be found or loaded
    │   └── EngineDiedError                            the engine that held it is gone; another one can be started
    ├── MissingExtraError        also ImportError      an optional dependency is not installed
    ├── UnsupportedOperationError also RuntimeError    an operation has no population rule for a parameter
    ├── RewardError              also RuntimeError     a reward raised, or returned the wrong thing
    ├── MemoryBudgetError        also MemoryError      a population does not fit
    └── RunError                 also RuntimeError     a run directory cannot be used
        ├── CheckpointError                            a checkpoint is missing, truncated or of another run
        └── RunWriteError        also OSError          the run directory cannot be written (disk full, read-only)

Every message says what was given, what is allowed and how to fix it. Each class takes the message alone, so that
all of them survive pickling (a worker's error reaches the driver as it was).
"""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EggrollError",
    "EngineDiedError",
    "MemoryBudgetError",
    "MissingExtraError",
    "ModelError",
    "RewardError",
    "RunError",
    "RunWriteError",
    "SelectionError",
    "UnsupportedOperationError",
    "raised_at",
]


class EggrollError(Exception):
    """Base of every error that eggroll raises on purpose."""


class ConfigError(EggrollError, ValueError):
    """A setting, or several settings together, cannot work. The message lists every problem found."""

    @classmethod
    def from_problems(cls, what: str, problems: list[str]) -> ConfigError:
        """One error for all problems of ``what``: a sentence for one, a list for several."""
        if len(problems) == 1:
            return cls(f"{what}: {problems[0]}")
        lines = "\n".join(f"  - {problem}" for problem in problems)
        return cls(f"{what} has {len(problems)} problems:\n{lines}")


class SelectionError(ConfigError):
    """A pattern that selects parameters matches nothing, or the selection is empty."""


class DataError(EggrollError, ValueError):
    """A data set is missing, empty or not of the form that the reward needs."""


class ModelError(EggrollError, OSError):
    """A model cannot be found, loaded or saved."""


class EngineDiedError(ModelError):
    """The engine that held a model died. A pool of workers starts another one; a run without one can be resumed."""


class MissingExtraError(EggrollError, ImportError):
    """An optional dependency is not installed. The message holds the pip line."""


class UnsupportedOperationError(EggrollError, RuntimeError):
    """A perturbed parameter is used in an operation that has no population rule.

    No ``TypeError``: torch's operators answer one with ``NotImplemented``, so that ``x == weight`` would be ``False``.
    """


class RewardError(EggrollError, RuntimeError):
    """A reward could not be loaded, raised, or returned the wrong number or kind of values."""


class MemoryBudgetError(EggrollError, MemoryError):
    """A population does not fit into the memory that is there."""


class RunError(EggrollError, RuntimeError):
    """A run directory cannot be used as asked."""


class CheckpointError(RunError):
    """A checkpoint is missing, truncated, or belongs to another run."""


class RunWriteError(RunError, OSError):
    """The run directory cannot be written, for example because the disk is full."""


def raised_at(error: BaseException) -> str | None:
    """Where in a user's own file a reward raised: the last line of it that was being run."""
    if not isinstance(error, RewardError) or error.__cause__ is None:
        return None
    library = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], str(Path(__file__).parent), "<")
    frames = traceback.extract_tb(error.__cause__.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(library)]
    return f"  at {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else None
