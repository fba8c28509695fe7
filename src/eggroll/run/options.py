"""What every command that trains can be told about its run."""

from __future__ import annotations

from dataclasses import dataclass

from eggroll.core.settings import setting


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run is kept and who is told of it."""

    output: str | None = setting(None, flags=("-o",))
    """Run directory (default: runs/NAME-TIME)."""
    resume: str | None = setting(None, resume=True)
    """Continue the run in this directory with the settings it has."""
    accept_changes: bool = setting(False, resume=True)
    """Resume although the data, the model or a program's source have changed; environment.json notes what."""
    patience: int = setting(0, resume=True)
    """End the run after this many held-out evaluations in a row that do not beat the best; 0 runs to the end."""
    report_to: str = setting("tensorboard", resume=True)
    """tensorboard, wandb, trackio, none, or several separated by commas."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where PyTorch computes."""

    device: str = setting("auto", resume=True)
    """cpu, cuda, cuda:1; auto takes a GPU if there is one."""
