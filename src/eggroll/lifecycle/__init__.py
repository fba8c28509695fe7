"""The life of a run, whatever evolves: open it, train, resume, replay.

A new domain describes itself as a :class:`~eggroll.lifecycle.kind.RunKind`: its options, how a worker is made of them,
and what is done with the result. Everything else is here, once.
"""

from eggroll.lifecycle.kind import Plan, RunKind, Saved, Sitting
from eggroll.lifecycle.opening import kind_name, options_of_run, resumed_options
from eggroll.lifecycle.replaying import Replayed, rebuild, replay
from eggroll.lifecycle.training import Opened, Trained, train

__all__ = [
    "Opened",
    "Plan",
    "Replayed",
    "RunKind",
    "Saved",
    "Sitting",
    "Trained",
    "kind_name",
    "options_of_run",
    "rebuild",
    "replay",
    "resumed_options",
    "train",
]
