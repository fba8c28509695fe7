"""A run on two workers that can be killed and continued. Started by test_resume.py: driver_script.py DIR [resume]."""

import importlib.util
import os
import sys
from pathlib import Path

from ray import cloudpickle

from eggroll.distributed import evolve


def main(directory, resume):
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
    toys = importlib.util.module_from_spec(spec)
    sys.modules["toys"] = toys
    spec.loader.exec_module(toys)
    cloudpickle.register_pickle_by_value(toys)
    log = Path(directory).with_name("log")
    found = evolve(
        lambda: toys.NumpyWorker(sleep=0.02, log=log),
        toys.config(),
        workers=2,
        run=directory,
        resume=resume,
        heldout=True,
        checkpoint_every=3,
        notify=print,
    )
    ray = sys.modules["ray"]
    print("interrupted" if found.interrupted else "done", "ray is running" if ray.is_initialized() else "ray is down")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(sys.argv[1], "resume" in sys.argv)
