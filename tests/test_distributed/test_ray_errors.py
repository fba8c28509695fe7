"""What a pool says when something is wrong."""

import http.server
import re
import socketserver
import sys
import threading
import time

import pytest

from eggroll.distributed import RayPool, evolve, ray_address
from eggroll.distributed.crew import WorkerWarning
from eggroll.distributed.ray_address import check_address
from eggroll.errors import ConfigError, MemoryBudgetError, MissingExtraError, RewardError, RunError

SIZE = 32


def make(factory, **settings):
    return RayPool(factory, **{"workers": 1, "population_size": SIZE, **settings})


def test_no_room_anywhere(cluster, toys):
    with pytest.raises(MemoryBudgetError, match=r"^the model needs 14 GB, 2 GB are free \(on node \S+\)$"):
        make(toys.without_room)


def test_no_room_in_one_place(cluster, toys, tmp_path):
    told = []
    with make(toys.once_without_room(tmp_path / "m"), workers=2, notify=told.append) as pool:
        while len(pool.workers()) > 1:
            pool.evaluate(0, 0.1)
        assert pool.evaluate(0, 0.1).metrics["workers"] == 1
    told = [text for text in told if not text.endswith("Waiting")]  # on a busy machine
    assert len(told) == 1
    assert re.match(r"worker \d is left out: the model needs 14 GB, 2 GB are free \(on node ", told[0])


def test_a_worker_that_dies_again_and_again(cluster, toys):
    with make(toys.Deadly) as pool, pytest.warns(WorkerWarning), pytest.raises(RunError) as caught:
        pool.evaluate(0, 0.1)
    text = str(caught.value)
    assert "is the 3rd process in a row that died without finishing anything: " in text
    assert "exit" in text
    assert "The last that it wrote:\nthe last words" in text


def test_errors_of_a_reward_are_raised_as_they_are_and_bugs_say_where(cluster, toys):
    with make(toys.Wrong) as pool, pytest.raises(RewardError, match=r"^the reward is wrong$"):
        pool.evaluate(0, 0.1)
    with make(toys.Buggy) as pool, pytest.raises(KeyError, match=r"nothing") as caught:
        pool.evaluate(0, 0.1)
    (note,) = caught.value.__notes__
    assert note.startswith("In a worker of the cluster:\nray::WorkerActor.call()")
    assert "toys.py" in note


def test_a_factory_that_cannot_travel(cluster):
    file = sys.stdout
    with pytest.raises(ConfigError, match=r"cannot be sent to another process .*make them inside the factory"):
        make(lambda: file)


def test_a_factory_whose_module_is_missing_there(cluster, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def factory():\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    only_here = __import__("only_here")
    with pytest.raises(ConfigError, match=r"needs the module 'only_here', which node \S+ cannot import: install it"):
        make(only_here.factory)


def test_nowhere_to_go(cluster, toys):
    with pytest.raises(
        RunError, match=r"could be placed for 1 s: each needs 99 CPUs on one node; in the cluster \S+ of 8"
    ):
        make(toys.NumpyWorker, cpus_per_worker=99, start_timeout_s=0.5)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", r"no Ray cluster at address='127.0.0.1:1' \(.*refused"),
        ("no-such-host.invalid:6379", r"no Ray cluster at address='no-such-host.invalid:6379' \("),
        ("head", r"address='head' is no address: it must be 'auto' or 'HOST:PORT'"),
        ("ray://head:10001", r"a Ray Client address, which is not supported: .*`ray job submit`"),
    ],
)
def test_a_wrong_address(toys, address, reason, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    with pytest.raises(ConfigError, match=rf"{reason}.*`ray start --head`"):
        make(toys.NumpyWorker, address=address)


class Silent(socketserver.BaseRequestHandler):
    """A server that listens to everything and says nothing."""

    def handle(self):
        while self.request.recv(1000):
            pass


class Talking(socketserver.BaseRequestHandler):
    """One that has its say first, as SSH does."""

    def handle(self):
        self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (http.server.BaseHTTPRequestHandler, r"it answers b'<!DOCTYPE' to a greeting of gRPC"),
        (Talking, "it answers b'SSH-2.0-O' to a greeting of gRPC"),
        (Silent, "it says nothing in 0.5 s, or hangs up to a greeting of gRPC"),
    ],
)
def test_something_listens_that_is_not_ray(toys, handler, reason, monkeypatch):
    """Ray itself takes more than three minutes to give up."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_address, "ANSWER_S", 0.5 if handler is Silent else ray_address.ANSWER_S)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"something listens at .* no Ray head \({reason}\).*`ray start --head"):
            make(toys.NumpyWorker, address=f"127.0.0.1:{server.server_address[1]}")
        assert time.monotonic() - began < 15
        server.shutdown()


def test_another_service_of_grpc_is_not_ray(cluster, monkeypatch):
    """A port of the cluster, but not the head's: its node manager's."""
    (node,) = cluster.nodes()
    monkeypatch.setattr(ray_address, "QUESTION_S", 120)  # a process that loads Ray may take its time on a busy machine
    with pytest.raises(ConfigError, match="it speaks gRPC and does not know what Ray's head is asked"):
        check_address(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")


def test_a_real_head_passes_even_when_it_is_slow(cluster, monkeypatch):
    address = cluster.get_runtime_context().gcs_address
    with monkeypatch.context() as patch:
        patch.setattr(ray_address, "QUESTION_S", 120)
        check_address(address)
    monkeypatch.setattr(ray_address, "QUESTION_S", 0.01)  # no answer in time is no reason to refuse it
    check_address(address)


def test_another_address_than_the_one_in_use(cluster, toys):
    with pytest.raises(
        ConfigError, match=r"is connected to the Ray cluster at \S+ already, so it cannot use address='a:1'"
    ):
        make(toys.NumpyWorker, address="a:1")


def test_ray_is_not_installed(toys, monkeypatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"'ray' is needed here .*pip install .*\[ray\]"):
        make(toys.NumpyWorker)


def test_settings(toys):
    with pytest.raises(ConfigError, match=r"gpus_per_worker \(=-1\) must be a number of at least 0"):
        make(toys.NumpyWorker, gpus_per_worker=-1)
    with pytest.raises(ConfigError, match=r"gpus_per_worker \(=1.5\) must be a whole number above 1: use 1 or 2"):
        make(toys.NumpyWorker, gpus_per_worker=1.5)
    with pytest.raises(ConfigError, match=r"gpus_per_worker \(=0.5\) must be a whole number of at least 1 when each"):
        make(toys.NumpyWorker, gpus_per_worker=0.5, across_nodes=True)
    with pytest.raises(ConfigError, match="resume=True needs run"):
        evolve(toys.NumpyWorker, toys.config(), resume=True)
    with pytest.raises(ConfigError, match="local=True starts no processes, so address cannot be used"):
        evolve(toys.NumpyWorker, toys.config(), local=True, address="auto")
