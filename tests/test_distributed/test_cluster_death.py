"""A local cluster is patient while the machine is busy, and one that dies is said in a sentence."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eggroll.distributed import ray_cluster
from eggroll.distributed.ray_actor import RayTransport
from eggroll.distributed.transport import WorkerLostError
from eggroll.errors import RunError


class TestSettings:
    def test_a_busy_node_is_not_a_dead_one(self):
        found = ray_cluster.system_config()
        assert found["health_check_timeout_ms"] * found["health_check_failure_threshold"] == 600_000
        assert found["worker_niceness"] == 0

    def test_what_the_user_has_set_stays(self, monkeypatch):
        monkeypatch.setenv("RAY_health_check_timeout_ms", "5000")
        monkeypatch.setenv("RAY_worker_niceness", "10")
        assert set(ray_cluster.system_config()) == {"health_check_period_ms", "health_check_failure_threshold"}


class Slow:
    """A Ray that needs several attempts to start."""

    def __init__(self, failures, error):
        self.failures, self.error, self.ended = failures, error, 0

    def init(self, address, **settings):
        if self.failures > 0:
            self.failures -= 1
            raise self.error

    def shutdown(self):
        self.ended += 1


class TestStart:
    @pytest.mark.parametrize("error", [Exception("The current node timed out during startup."), SystemExit(1)])
    def test_a_busy_machine_gets_more_time(self, error):
        ray = Slow(3, error)
        ray_cluster._start(ray, {})
        assert ray.ended == 3

    def test_it_ends_in_a_sentence(self):
        with pytest.raises(RunError) as info:
            ray_cluster._start(Slow(9, Exception("The current node timed out during startup.\nMore.")), {})
        assert str(info.value) == (
            "Ray could not be started on this machine in 4 attempts (The current node timed out during startup.). It "
            "may be too busy, or short of memory or processes: try again when it is quieter, or leave --workers "
            "(workers=) out"
        )

    def test_a_scheduler_that_ends_the_process_is_obeyed(self):
        ray = Slow(1, SystemExit(signal.SIGTERM))
        with pytest.raises(SystemExit):
            ray_cluster._start(ray, {})

    def test_wrong_settings_are_not_tried_again(self):
        ray = Slow(1, ValueError("no such setting"))
        with pytest.raises(ValueError, match="no such setting"):
            ray_cluster._start(ray, {})
        assert ray.ended == 0


class Ended:
    def __init__(self, status):
        self.pid, self.status = 4711, status

    def poll(self):
        return self.status


class TestDeath:
    @pytest.mark.parametrize(
        ("kind", "status", "text"),
        [
            ("raylet", None, ""),
            ("raylet", -9, "its raylet (pid 4711) was killed by SIGKILL"),
            ("raylet", -999, "its raylet (pid 4711) was killed by signal 999"),
            ("gcs_server", 1, "its GCS server (pid 4711) ended with status 1"),
            ("log_monitor", -9, ""),  # nobody needs it
        ],
    )
    def test_what_died(self, monkeypatch, kind, status, text):
        monkeypatch.setattr(ray_cluster, "_processes", lambda: [("dashboard", Ended(0)), (kind, Ended(status))])
        assert ray_cluster.death() == text

    def test_somebody_elses_cluster_is_not_watched(self, monkeypatch):
        monkeypatch.setattr(ray_cluster, "require", lambda *_, **__: None)  # no node in this process
        assert ray_cluster.death() == ""

    def test_an_answer_that_never_comes(self):
        """The cluster dies while a state is fetched from it."""
        errors = pytest.importorskip("ray").exceptions
        looks = iter(["", "its raylet (pid 7) was killed by SIGTERM"])

        def get(ticket, timeout):
            raise errors.GetTimeoutError("not yet")

        transport = RayTransport.__new__(RayTransport)
        transport._ray = SimpleNamespace(get=get, exceptions=errors)
        transport._death = lambda: next(looks)
        with pytest.raises(RunError, match=r"is gone: its raylet \(pid 7\) was killed by SIGTERM"):
            transport.result("ticket")

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "name"), [("raylet", "raylet"), ("gcs_server", "GCS server")])
    def test_a_real_one(self, kind, name):
        pytest.importorskip("ray")
        script = Path(__file__).with_name("death_script.py")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_health")}
        done = subprocess.run(
            [sys.executable, str(script), kind],
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        patience, niceness, error, left = done.stdout.splitlines()
        assert patience == "patience 600 s"
        assert niceness == "niceness {0}"
        assert error == (
            f"error the Ray cluster of this run is gone: its {name} (pid N) was killed by SIGKILL, and the workers "
            "with it. If nobody ended it, the machine may be out of memory (the kernel's log says so): use fewer "
            "workers, or ones that need less"
        )
        assert left == "left []"


class TestSomebodyElsesCluster:
    def test_a_machine_that_ray_has_declared_dead(self):
        """All that can be told is what Ray says about the workers."""
        errors = pytest.importorskip("ray").exceptions

        def get(ticket, timeout):
            raise errors.RayError(
                "The actor died unexpectedly.\nThe actor is dead because its owner has died. Worker exit detail: "
                "Owner's node has crashed."
            )

        transport = RayTransport.__new__(RayTransport)
        transport._ray = SimpleNamespace(get=get, exceptions=errors)
        with pytest.raises(RunError) as info:
            transport.result("ticket")
        assert str(info.value) == (
            "Ray has declared the machine of this process dead (The actor is dead because its owner has died. Worker "
            "exit detail: Owner's node has crashed.), and ends all its workers. It may have been too busy to answer: "
            "start the cluster with more patience, for example with RAY_health_check_timeout_ms=60000 in the "
            "environment of `ray start --head`"
        )

    def test_a_worker_that_died_alone(self):
        errors = pytest.importorskip("ray").exceptions

        def get(ticket, timeout):
            raise errors.RayError("The actor is dead because all references were removed.")

        transport = RayTransport.__new__(RayTransport)
        transport._ray = SimpleNamespace(get=get, exceptions=errors)
        with pytest.raises(WorkerLostError, match="all references"):
            transport.result("ticket")
