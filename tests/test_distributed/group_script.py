"""Workers with several GPUs on a cluster of two nodes with two GPUs each. Started by test_groups.py.

The GPUs are Ray's bookkeeping: no device is needed, and none is touched.
"""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import ray
import toys
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.util import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eggroll.distributed import LocalPool, RayPool
from eggroll.errors import RunError
from eggroll.loop import Loop

SIZE = 8
WAIT_S = float(os.environ.get("WAIT_S", "120"))


def states():
    return [group["state"] for group in placement_group_table().values()]


def until(true, what):
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, (what, placement_group_table())
        time.sleep(0.1)


def here():
    """Which GPUs this process holds: pairs of a node and a number."""
    context = ray.get_runtime_context()
    return [(context.get_node_id(), int(number)) for number in context.get_accelerator_ids()["GPU"]]


def seen(folder, pids):
    return [json.loads((folder / str(pid)).read_text()) for pid in pids]


def pids_of(pool, phase="ready"):
    return [one["pid"] for one in pool.workers() if one["phase"] == phase]


def on_one_node(folder):
    """Two workers with two GPUs each; a killed one is replaced in a group of its own; a third waits."""

    class Seeing(toys.NumpyWorker):
        def __init__(self):
            super().__init__(sleep=0.01)
            (folder / str(os.getpid())).write_text(
                json.dumps({"gpus": here(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES", "")})
            )

    settings = toys.config(population_size=SIZE)
    with LocalPool(toys.NumpyWorker, population_size=SIZE) as pool:
        Loop(settings, pool).go()
        expected = pool.state_tensors()["parameter/theta"].clone()
    told = []
    with RayPool(Seeing, workers=2, population_size=SIZE, gpus_per_worker=2, notify=told.append) as pool:
        pool.wait_until_ready(2, WAIT_S)
        first = pids_of(pool)

        def kill(metrics):
            if metrics["generation"] == 4:
                os.kill(first[0], signal.SIGKILL)
            return False

        Loop(settings, pool, stop=kill).go()
        pool.wait_until_ready(2, WAIT_S)
        assert pool.state_tensors()["parameter/theta"].equal(expected)
        assert any("is gone" in text for text in told), told
        second = pids_of(pool)
        assert first[0] not in second
        assert first[1] in second
        for pids in (first, second):
            held = seen(folder, pids)
            assert all(len(one["visible"].split(",")) == 2 for one in held), held
            assert all(len({node for node, _ in one["gpus"]}) == 1 for one in held), held
            assert len({tuple(gpu) for one in held for gpu in one["gpus"]}) == 4, held
        until(lambda: sorted(states()) == ["CREATED", "CREATED", "REMOVED"], "the killed worker's group is gone")
        pool.add_worker()
        until(lambda: "PENDING" in states(), "the third worker's group waits")
        pool.evaluate(0, 0.1)
        assert [one["phase"] for one in pool.workers()] == ["ready", "ready", "waiting"]
        text = pool._transport.shortage()
        assert text.startswith("each needs 1 CPU and 2 GPUs on one node; in the cluster "), text
        assert text.endswith("0 of 4 GPUs are free"), text
        pool._crew._lost(pool._crew._seats[pool.workers()[0]["number"]], "taken away")
        pool.wait_until_ready(2, WAIT_S)  # the third has its place now, and who replaces the lost one waits
        assert len({tuple(gpu) for one in seen(folder, pids_of(pool)) for gpu in one["gpus"]}) == 4
        assert sorted(set(states())) == ["CREATED", "PENDING", "REMOVED"]
    until(lambda: set(states()) == {"REMOVED"}, "nothing is left")
    print("one node: the same weights")


def too_large():
    """Three GPUs are there, on no node together: the message says so, and nothing stays reserved."""
    for settings, end in (
        ({"gpus_per_worker": 3}, ", and no node is that large"),
        ({"gpus_per_worker": 1.0, "cpus_per_worker": 7}, ", and no node is that large"),
    ):
        with pytest.raises(RunError, match=f"{end}$"):
            RayPool(toys.NumpyWorker, workers=1, population_size=SIZE, start_timeout_s=0.5, **settings)
    until(lambda: set(states()) == {"REMOVED"}, "nothing is left")
    print("too large: said")


class Part:
    """What an engine starts on each of its GPUs."""

    def look(self):
        return here()


def across(folder):
    """Three GPUs on two nodes, as vLLM's Ray executor wants them: the worker finds its group and fills its bundles."""

    class Spread(toys.NumpyWorker):
        def __init__(self):
            super().__init__()
            group = get_current_placement_group()
            self.parts = [
                ray.remote(Part)
                .options(
                    num_cpus=0,
                    num_gpus=1,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=group, placement_group_bundle_index=index
                    ),
                )
                .remote()
                for index, _ in enumerate(group.bundle_specs)
            ]
            gpus = [gpu for (gpu,) in ray.get([part.look.remote() for part in self.parts])]
            found = {
                "gpus": gpus, "own": here(), "node": ray.get_runtime_context().get_node_id(),
                "bundles": group.bundle_specs, "hidden": "CUDA_VISIBLE_DEVICES" in os.environ,
            }  # fmt: skip
            (folder / str(os.getpid())).write_text(json.dumps(found))

    with RayPool(
        Spread, workers=1, population_size=SIZE, gpus_per_worker=3, across_nodes=True, notify=lambda text: None
    ) as pool:
        pool.wait_until_ready(1, WAIT_S)
        for turn in range(2):  # the second one is in the place of one that was killed
            (pid,) = pids_of(pool)
            (found,) = seen(folder, [pid])
            assert found["bundles"] == [{"CPU": 1, "GPU": 1}, {"GPU": 1}, {"GPU": 1}], found
            assert len({tuple(gpu) for gpu in found["gpus"]}) == 3, found
            assert len({node for node, _ in found["gpus"]}) == 2, found
            assert found["gpus"][0][0] == found["node"], "the process is beside the first GPU"
            assert (found["own"], found["hidden"]) == ([], False)
            assert states().count("CREATED") == 1
            if turn == 0:
                os.kill(pid, signal.SIGKILL)
                while pid in pids_of(pool):
                    pool.evaluate(0, 0.1)
                pool.wait_until_ready(1, WAIT_S)
    until(lambda: set(states()) == {"REMOVED"}, "nothing is left")
    until(lambda: ray.available_resources().get("GPU") == 4, "the GPUs are free again")
    print("across nodes: one bundle for each GPU")


def main():
    cloudpickle.register_pickle_by_value(toys)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=4, num_gpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        on_one_node(Path(folder))
        too_large()
        across(Path(folder))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
