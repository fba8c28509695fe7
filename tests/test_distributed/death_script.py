"""A pool whose cluster dies. Started by test_cluster_death.py: death_script.py KIND, where KIND is what to kill."""

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path

from ray import cloudpickle

from eggroll.distributed import RayPool, ray_cluster
from eggroll.errors import RunError
from eggroll.loop import Loop


def main(kind):
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
    toys = importlib.util.module_from_spec(spec)
    sys.modules["toys"] = toys
    spec.loader.exec_module(toys)
    cloudpickle.register_pickle_by_value(toys)
    victim = None
    try:
        with RayPool(lambda: toys.NumpyWorker(sleep=0.02), workers=1, population_size=32) as pool:
            from ray._raylet import Config

            print("patience", Config.health_check_timeout_ms() * Config.health_check_failure_threshold() // 1000, "s")
            workers = [seat.info["pid"] for seat in pool._crew.seats()]
            print("niceness", {os.getpriority(os.PRIO_PROCESS, pid) for pid in workers})
            victim = next(process for found, process in ray_cluster._processes() if found == kind)
            threading.Timer(1.0, os.kill, (victim.pid, signal.SIGKILL)).start()
            Loop(toys.config(generations=100_000), pool).go(0)
    except RunError as error:
        print("error", str(error).replace(f"pid {victim.pid}", "pid N"))
    print("left", [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists() and _command(pid)])


def _command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


if __name__ == "__main__":
    main(sys.argv[1])
