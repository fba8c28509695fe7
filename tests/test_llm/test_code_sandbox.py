"""What the sandbox promises in each layer that this machine has, and that scored code cannot crash the reward."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from eggroll.errors import RewardError
from eggroll.llm.rewards import CodeExecutionReward, CustomReward, MultiReward, sandbox, sandbox_cgroup, sandbox_layers
from eggroll.llm.rewards.sandbox import Limits
from eggroll.llm.rewards.sandbox_cgroup import Group, delegated
from eggroll.llm.rewards.sandbox_folder import Folder, remove_leftovers
from eggroll.llm.rewards.sandbox_layers import Isolation
from eggroll.llm.rewards.sandbox_watch import descendants

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX resource limits")

ENOUGH = Limits(seconds=30.0)  # a busy machine is no failure
LAYERS = ("bubblewrap", "namespaces", "limits")


@pytest.fixture(params=LAYERS)
def layer(request, monkeypatch):
    """Each layer, with the strongest user that works here."""
    return _layer(request.param, monkeypatch)


@pytest.fixture(params=LAYERS[:2])
def shut_in(request, monkeypatch):
    """The layers with namespaces."""
    return _layer(request.param, monkeypatch)


@pytest.fixture
def alone(monkeypatch):
    """Limits only, as a user whom the kernel can refuse processes."""
    return _layer("limits", monkeypatch)


def _layer(name, monkeypatch):
    root = os.geteuid() == 0
    if name == "limits" and root and not sys.executable.startswith("/usr/"):
        if not Path("/usr/bin/python3").exists():
            pytest.skip("nobody cannot run a Python in root's home, and there is no other")
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    wanted = {
        "bubblewrap": lambda how: how.bubblewrap,
        "namespaces": lambda how: how.namespaces and not how.bubblewrap,
        "limits": lambda how: not how.namespaces and (how.drop_user or not root),
    }
    for how in filter(wanted[name], sandbox_layers.choices(None)):
        try:
            if sandbox._run(sandbox.PROBE, None, "", ENOUGH, how).output.strip() == '"ready"':
                return how
        except RewardError:
            continue
    pytest.skip(f"the layer {name!r} does not work on this machine")


def program(code, how, limits=ENOUGH, stdin=""):
    return sandbox._run(code, None, stdin, limits, how)


def said(code, how, limits=ENOUGH):
    """What ended a candidate."""
    return sandbox._run(code, ["pass"], "", limits, how).results.get(-1, "")


class TestScoredCodeCannotCrashTheReward:
    """Whatever it does is a score."""

    FLOOD = "import os\nfor fd in range(3, 30):\n    try: os.write(fd, {text} + b'\\n')\n    except OSError: pass\n"

    @pytest.mark.parametrize(
        "code",
        [
            FLOOD.format(text="b'[' * 200_000"),
            FLOOD.format(text="b'[\"' + sys._getframe(2).f_locals['word'].encode() + b'\", [], \"passed\"]'"),
            FLOOD.format(text="b'[\"' + sys._getframe(2).f_locals['word'].encode() + b'\", ' + b'[' * 100_000"),
            FLOOD.format(text="b'9' * 6000"),
            "import os\nfor fd in range(3, 30):\n    try: os.ftruncate(fd, 0)\n    except OSError: pass\nos._exit(0)",
            "import os\nos.closerange(0, 30)",
            "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd",
            "x = '\ud83d'",
            "x = '\0'",
            "(" * 10_000,
        ],
    )
    def test_what_it_writes(self, code):
        reward = CodeExecutionReward(tests=["assert add(1, 2) == 3"], limits=ENOUGH)
        assert reward.score(["p"], ["import sys\n" + code]) == [0.0]

    def test_only_records_of_the_right_form_count(self):
        lines = ['["w", [], "passed"]', '["w", true, "passed"]', '["w", 0, 7]', '["w", 1e999, "x"]', '["w", {}, "x"]',
                 '["w", 1, "passed", 2]', '["w"', '["w", ' + "[" * 200_000, '["w", ' + "9" * 6000 + ', "x"]',
                 '["v", 3, "passed"]', '["w", 2, "passed"]', '["w", 2, "failed"]', "\udcff"]  # fmt: skip
        assert sandbox._results("\n".join(lines), "w") == {2: "passed"}

    def test_input_that_is_no_unicode(self):
        reward = CodeExecutionReward([{"input": "\ud83d", "output": "1"}], limits=ENOUGH)
        assert reward.score(["p"], ["print(len(input()))"]) == [1.0]

    def test_output_without_end_to_the_results(self, layer):
        code = (
            "import os\nwhile True:\n    for fd in range(3, 10):\n        try: os.write(fd, b'x' * 4096)\n"
            "        except OSError: pass"
        )
        outcome = sandbox._run(code, ["pass"], "", Limits(seconds=2.0), layer)
        assert 0 not in outcome.results

    def test_very_deep_folders_are_removed(self, alone, monkeypatch):
        code = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\nprint('deep')"
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a thousand nested folders are slow on a disk
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            os.chmod(folder, 0o777)
            monkeypatch.setattr(tempfile, "tempdir", folder)
            assert program(code, alone).output == "deep\n"
            assert os.listdir(folder) == []


class TestDriverKilled:
    def test_nothing_outlives_it(self, layer, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(_open_to_all(tmp_path)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fork beside other threads
            driver = os.fork()
        if driver == 0:
            program("import time\ntime.sleep(45)", layer)
            os._exit(0)
        try:
            _until(lambda: any(b"sandbox_child" in _command(pid) for pid in descendants(driver)[1:]))
            time.sleep(0.5)  # until it has tied itself
            family = descendants(driver)[1:]
            assert family
        finally:
            os.kill(driver, signal.SIGKILL)
            os.waitpid(driver, 0)
        _until(lambda: not any(_runs(pid) for pid in family))
        assert len(list(tmp_path.iterdir())) == (0 if layer.namespaces else 1)
        remove_leftovers()
        assert list(tmp_path.iterdir()) == []

    def test_folders_in_use_and_links_stay(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").write_text("kept")
        (tmp_path / "eggroll-code-link").symlink_to(victim)
        (tmp_path / "eggroll-code-old").mkdir()
        with Folder(Isolation(False, False)) as folder:
            remove_leftovers()
            assert Path(folder).is_dir()
            assert not (tmp_path / "eggroll-code-old").exists()
        assert not Path(folder).exists()
        assert (victim / "precious").read_text() == "kept"


class TestPromises:
    def test_no_other_process_is_seen(self, shut_in):
        code = "import os\npids = [p for p in os.listdir('/proc') if p.isdigit()]\nprint(len(pids))"
        assert int(program(code, shut_in).output) <= 3

    def test_sockets_on_disk_are_out_of_reach(self, layer):
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
            os.chmod(folder, 0o755)
            path = f"{folder}/s"
            server.bind(path)
            server.listen()
            os.chmod(path, 0o777)
            reason = said(f"import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})", layer)
            assert "No such file" in reason if layer.namespaces else "socket.connect is not allowed" in reason
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()

    def test_own_files_are_out_of_reach(self, shut_in, tmp_path):
        (tmp_path / "secret").write_text("hunter2")
        assert "No such file" in said(f"open({str(tmp_path / 'secret')!r})", shut_in)
        assert "Read-only" in said("open('/usr/x', 'w')", shut_in)

    def test_memory_of_all_processes_together(self, shut_in):
        code = (
            "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        x = b'x' * (60 * 2**20)\n"
            "        time.sleep(60)\ntime.sleep(60)"
        )
        outcome = program(code, shut_in, Limits(seconds=30.0, memory=128 * 2**20))
        assert not outcome.timed_out
        assert "killed: it used more than 128 MiB together" in outcome.error

    def test_shared_memory_counts_once(self, shut_in):
        code = (
            "import os, time\nx = b'x' * (60 * 2**20)\nif all([os.fork(), os.fork()]):\n    time.sleep(0.3)\n"
            "    print('y')\nelse:\n    time.sleep(60)"
        )
        outcome = program(code, shut_in, Limits(seconds=30.0, memory=128 * 2**20))
        assert (outcome.output, outcome.error) == ("y\n", "")

    def test_no_namespaces_of_its_own(self, shut_in):
        code = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.unshare(0x10000000), ctypes.get_errno())"
        assert program(code, shut_in).output == "-1 1\n"

    def test_threads_and_children_run(self, shut_in):
        code = (
            "import subprocess, threading\nt = threading.Thread(target=print, args=('thread',))\nt.start()\nt.join()\n"
            "print(subprocess.run(['echo', 'child'], capture_output=True, text=True).stdout)"
        )
        assert program(code, shut_in).output.split() == ["thread", "child"]

    @pytest.mark.parametrize(
        "code",
        [
            "import os\nif os.fork() == 0: os.setsid()",
            "import os\nos.posix_spawn('/bin/true', ['true'], {})",
            "import os\nos.spawnl(os.P_NOWAIT, '/bin/true', 'true')",
            "import os, pty\npty.fork()",
            "import os\nos.kill(os.getppid(), 0)",
            "import os\nos.killpg(os.getppid(), 0)",
            "import subprocess\nsubprocess.run(['true'])",
        ],
    )
    def test_limits_only_has_no_other_process(self, alone, code):
        assert "is not allowed in the sandbox" in said(code, alone)

    def test_limits_only_is_one_process_for_the_kernel_too(self, alone):
        """What passes the audit hook: C code of the standard library, and threads."""
        spawn = (
            "import _posixsubprocess as p\np.fork_exec([b't'], [b'/bin/true'], True, (9,), None, None, *[-1] * 7, 9, "
            "False, False, -1, None, None, None, -1, None, False)"
        )
        if sys.version_info[:2] == (3, 11):  # other versions take other arguments
            assert "Resource temporarily unavailable" in said(spawn, alone)
        assert "can't start new thread" in said("import threading\nthreading.Thread(target=print).start()", alone)

    def test_asyncio_runs_in_each_layer(self, layer):
        code = "import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    print('done')\nasyncio.run(main())"
        assert program(code, layer).output == "done\n"


class TestWhatIsSaid:
    def test_protections_in_force(self, monkeypatch):
        strong = Isolation(True, True, "/usr/bin/bwrap", "/sys/fs/cgroup/x").describe()
        assert strong == (
            "sandbox (bubblewrap): no network, no sockets on disk, no other processes, no files but the system's and "
            "Python's (read-only), as nobody, total memory by cgroup"
        )
        assert "total memory watched" in Isolation(True, True).describe()
        monkeypatch.setattr(sandbox_layers, "can_watch", lambda: False)
        assert Isolation(True, True).describe().endswith("memory limited for each process only")
        weak = Isolation(False, True).describe()
        assert weak.startswith("sandbox (limits only): Python-level network block only, no child processes or threads")
        assert "code can read and delete what that user can, and see all processes" in weak

    def test_the_reward_says_it_at_the_start(self, layer, monkeypatch):
        monkeypatch.setattr(sandbox, "isolation", lambda: layer)
        reward = CodeExecutionReward(tests="assert True")
        assert reward.notes == [layer.describe()]
        assert MultiReward([(reward, 0.5), (CustomReward(lambda model, inputs: 0.0), 0.5)]).notes == [layer.describe()]

    def test_the_strongest_layer_is_taken(self, monkeypatch):
        names = [how.bubblewrap for how in sandbox_layers.choices(None)]
        assert all(names[: names.index(None)])
        monkeypatch.setattr(sandbox_layers.shutil, "which", lambda name: None)
        assert not any(how.bubblewrap for how in sandbox_layers.choices(None))
        placed = list(sandbox_layers.choices("/g"))
        assert placed[0].group == "/g"
        assert placed[-1] == Isolation(False, False)

    def test_limits_alone_warn(self, monkeypatch):
        monkeypatch.setattr(sandbox, "choices", lambda group: [Isolation(False, False)])
        sandbox.isolation.cache_clear()
        try:
            with pytest.warns(sandbox.SandboxWarning, match="limits only"):
                sandbox.isolation()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                sandbox.isolation()  # once
        finally:
            sandbox.isolation.cache_clear()


class TestGroups:
    def _tree(self, tmp_path, controllers):
        place = tmp_path / "fs" / "user" / "mine"
        place.mkdir(parents=True)
        for folder in (place, place.parent, tmp_path / "fs"):
            (folder / "cgroup.subtree_control").write_text("cpu\n")
            (folder / "cgroup.procs").write_text("")
        (place.parent / "cgroup.subtree_control").write_text(controllers)
        (tmp_path / "mounts").write_text(f"1 2 0:3 / {tmp_path}/fs rw - cgroup2 cgroup2 rw\n")
        (tmp_path / "own").write_text("4:memory:/x\n0::/user/mine\n")
        return delegated(str(tmp_path / "mounts"), str(tmp_path / "own"))

    def test_the_nearest_that_has_the_limits(self, tmp_path):
        assert self._tree(tmp_path, "cpu memory pids\n") == str(tmp_path / "fs/user")

    def test_none(self, tmp_path):
        assert self._tree(tmp_path, "cpu memory\n") is None
        assert delegated(str(tmp_path / "nothing"), str(tmp_path / "own")) is None

    def test_limits_are_written(self, tmp_path, monkeypatch):
        made = {}
        monkeypatch.setattr(sandbox_cgroup, "_write", lambda path, text: made.update({path.name: text}))
        limits = Limits(memory=100, disk=20, processes=3)
        with Group(str(tmp_path), limits) as group:
            place = next(tmp_path.iterdir())
            assert place.name.startswith(f"eggroll-code-{os.getpid()}-")
            assert made == {"memory.max": "120", "memory.swap.max": "0", "pids.max": "7"}
            assert group.enter()[-1] == f"{place}/cgroup.procs"
        assert made["cgroup.kill"] == "1"
        assert list(tmp_path.iterdir()) == []

    def test_a_run_in_a_real_group(self, layer):
        """Entered from the first instruction, ended and removed; the limits themselves need their controllers here."""
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        top = next((Path(line[4]) for line in mounts if line[line.index("-") + 1] == "cgroup2"), None)
        if top is None or not os.access(top / "cgroup.procs", os.W_OK):
            pytest.skip("this user cannot make cgroups")
        try:
            with Group(str(top), ENOUGH, values={}) as group:
                process = subprocess.Popen([*group.enter(), "sleep", "60"])
                place = next(top.glob(f"eggroll-code-{os.getpid()}-*"))
                _until(lambda: str(process.pid) in (place / "cgroup.procs").read_text().split())
                group.kill()
                assert process.wait(timeout=10) == -signal.SIGKILL
        except OSError as error:
            pytest.skip(f"this user cannot make cgroups: {error}")
        assert not place.exists()


def _open_to_all(folder):
    """A folder to which nobody has a way, too."""
    for path in (folder, *folder.parents[:3]):
        if path != Path(tempfile.gettempdir()):
            path.chmod(0o755)
    folder.chmod(0o777)
    return folder


def _until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _runs(pid):
    """Whether a process is there, and not only waiting for somebody to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
