"""Where a worker has its place in a Ray cluster: on a node with room, or in a placement group of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from eggroll._optional import require


@dataclass(frozen=True)
class Place:
    """What one worker takes of the cluster.

    A worker with more than one GPU gets a placement group: one bundle on one node, all of which its process holds,
    or with ``across_nodes`` a bundle for each GPU, on as few nodes as possible. The process then sits in the first
    bundle and holds its cores alone: the GPUs are for processes that it starts in the group, one in each bundle.
    That is what vLLM's Ray executor does, and it refuses bundles with more than one GPU.

    Attributes:
        cpus: cores.
        gpus: GPUs; a whole number above 1, any part of one below.
        across_nodes: the GPUs may be on several nodes.
    """

    cpus: int
    gpus: float
    across_nodes: bool = False

    @property
    def grouped(self) -> bool:
        """Whether the worker needs a placement group."""
        return self.gpus > 1 or self.across_nodes

    def bundles(self) -> list[dict[str, float]]:
        """Resources that lie together."""
        if not self.across_nodes:
            return [{"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}]
        others: list[dict[str, float]] = [{"GPU": 1} for _ in range(round(self.gpus) - 1)]
        return [{"CPU": self.cpus, "GPU": 1}, *others]

    def reserve(self) -> Any:
        """Ask for the worker's group; returns at once, however long it takes to find room. ``None`` without one."""
        if not self.grouped:
            return None
        strategy = "PACK" if self.across_nodes else "STRICT_PACK"
        return require("ray.util", extra="ray").placement_group(self.bundles(), strategy=strategy)

    def options(self, group: Any) -> dict[str, Any]:
        """The actor's options in its group."""
        if group is None:
            return {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}
        strategies = require("ray.util.scheduling_strategies", extra="ray")
        strategy = strategies.PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=0,
            # In a group on one node the process holds everything: a task that it starts would wait for ever.
            placement_group_capture_child_tasks=self.across_nodes,
        )
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "scheduling_strategy": strategy}
        if self.across_nodes:
            # It holds no GPU, so Ray before 2.50 hides all of them, and vLLM then takes the machine for one without.
            shown = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
            options |= {"num_gpus": 0, "runtime_env": shown}
        return options

    def shortage(self) -> str:
        """What a worker needs and what the cluster has, in words."""
        ray = require("ray", extra="ray")
        needs = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        if self.gpus:
            needs += f" and {self.gpus:g} GPU{'s' if self.gpus > 1 else ''}"
        if self.across_nodes:
            where = f"in a group of its own ({self.cpus} CPU{'s' if self.cpus > 1 else ''} beside the first GPU)"
        else:
            where = "on one node"
        total, free = ray.cluster_resources(), ray.available_resources()
        has = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s are free" for kind in ("CPU", "GPU"))
        text = f"each needs {needs} {where}; in the cluster {has}"
        if self.across_nodes:
            return text
        if not any(self._fits(node["Resources"]) for node in ray.nodes() if node["Alive"]):
            return f"{text}, and no node is that large"
        by_node = _free_by_node()
        if self._fits(free) and by_node and not any(self._fits(node) for node in by_node):
            text += f", but on no node together ({_nodes(by_node)})"
        return text

    def _fits(self, resources: Mapping[str, float]) -> bool:
        return resources.get("CPU", 0) >= self.cpus and resources.get("GPU", 0) >= self.gpus


def release(group: Any) -> None:
    """Give a group back, with everything that still runs in it."""
    if group is not None:
        require("ray.util", extra="ray").remove_placement_group(group)


def _free_by_node() -> list[Mapping[str, float]]:
    """What is free on each node. Ray has no public name for it, so it may be missing."""
    with suppress(Exception):
        return list(require("ray._private.state", extra="ray").available_resources_per_node().values())
    return []


def _nodes(nodes: list[Mapping[str, float]]) -> str:
    """The nodes with most GPUs, then most cores, first."""
    nodes = sorted(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), reverse=True)
    shown = [f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes[:3]]
    return "; ".join(shown) + ("; ..." if len(nodes) > 3 else "")
