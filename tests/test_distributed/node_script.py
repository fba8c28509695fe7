"""A run whose second node is lost, with the worker that wrote the last checkpoint. Started by test_node_loss.py."""

import ray
import toys
from ray import cloudpickle
from ray.cluster_utils import Cluster

from eggroll.distributed import LocalPool, RayPool
from eggroll.loop import Loop


def main():
    cloudpickle.register_pickle_by_value(toys)
    # The state is large enough to lie in the object store of the node that made it.
    factory, settings, told = (lambda: toys.NumpyWorker(100_000)), toys.config(population_size=8), []
    with LocalPool(factory, population_size=8) as pool:
        Loop(settings, pool).go()
        expected = pool.state_tensors()["parameter/theta"].clone()
    # Nothing fits on the head at first, so the lead is on the node that is lost.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    lost = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    with RayPool(factory, workers=1, population_size=8, notify=told.append) as pool:

        def lose(metrics):
            if metrics["generation"] == 4:
                pool._crew.copy_lead(pool._crew.ready()[0])  # what a comparison does: it never comes to the driver
            if metrics["generation"] == 6:
                cluster.remove_node(lost, allow_graceful=False)
                cluster.add_node(num_cpus=2)
                pool.add_worker()
            return False

        Loop(settings, pool, stop=lose).go()
        assert pool._crew.history.start()[:2] == (None, 0), "the state is lost: all records were replayed"
        assert pool.state_tensors()["parameter/theta"].equal(expected)
    assert any("is gone" in text for text in told), told
    assert ray.is_initialized(), "it was not the pool's to shut down"
    print("the same weights")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
