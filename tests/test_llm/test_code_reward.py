"""Code rewards: partial passes, every way to cheat or to break out that a model might stumble on, and limits."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from eggroll.errors import ConfigError, RewardError
from eggroll.llm.rewards import CodeExecutionReward, sandbox
from eggroll.llm.rewards.code import Tests as CodeTests
from eggroll.llm.rewards.code import extract_code, parse_tests, split_tests
from eggroll.llm.rewards.sandbox import Isolation, Limits, run_program, run_tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs POSIX resource limits")

ADD = "def add(a, b):\n    return a + b\n"
ENOUGH = Limits(seconds=30.0)  # a busy machine is no failure


@pytest.fixture(scope="module")
def needs_namespaces():
    if not sandbox.isolation().namespaces:
        pytest.skip("this system does not let its users make namespaces")


FORGED_RESULT = """
import os
for fd in range(3, 20):
    try: os.write(fd, b'["word", 0, "passed"]\\n')
    except OSError: pass
os._exit(0)
"""
CATCHES_EVERYTHING = """
import signal
signal.setitimer(signal.ITIMER_REAL, 0)
while True:
    try:
        while True: pass
    except BaseException: pass
"""


def outcome_of(code, limits=ENOUGH):
    """What the sandbox says of code that a test follows which always passes."""
    return run_tests(code, ["pass"], limits=limits).results


class TestScore:
    def test_fraction_of_tests(self):
        reward = CodeExecutionReward(tests=["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(0, 0) == 0"])
        completions = [f"Here it is:\n```python\n{ADD}```\nDone.", ADD.replace("+", "-"), "I cannot.", ""]
        assert reward.score(["p"] * 4, completions) == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0, 0.0]

    def test_tests_from_a_column(self):
        reward = CodeExecutionReward()
        columns = {"tests": [["assert add(1, 1) == 2"], "assert add(1, 1) == 3\nassert add(2, 2) == 4"], "n": [1, 2]}
        assert reward.score(["p", "q"], [ADD, ADD], columns) == [1.0, 0.5]

    def test_humaneval_form(self):
        test = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n"
        columns = {"test": [test, test], "entry_point": ["add", "add"]}
        assert CodeExecutionReward().score(["p", "p"], [ADD, "def add(a, b): return 3"], columns) == [1.0, 0.0]

    def test_standard_input_and_output(self):
        program = "a, b = map(int, input().split())\nprint(a + b, ' ')\n"
        tests = {"inputs": ["1 2\n", ["3 4"]], "outputs": ["3", "8\n"]}
        assert CodeExecutionReward(tests).score(["p"], [program]) == [0.5]

    def test_setup_comes_first(self):
        reward = CodeExecutionReward(tests=["assert root == 2"], setup="import math")
        assert reward.score(["p"], ["root = math.sqrt(4)"]) == [1.0]

    def test_same_code_runs_once(self, monkeypatch):
        runs = []
        monkeypatch.setattr(sandbox, "run_tests", lambda code, tests, limits: runs.append(code) or run_tests("", []))
        CodeExecutionReward(tests="assert True").score(["p"] * 3, [ADD, ADD, "x = 1"])
        assert sorted(runs) == sorted([ADD, "x = 1"])

    def test_same_score_every_time(self):
        code = "order = list({'a', 'b', 'c', 'd', 'e'})"
        first = run_program(code + "\nprint(order)").output
        assert all(run_program(code + "\nprint(order)").output == first for _ in range(3))

    def test_no_tests(self):
        with pytest.raises(RewardError) as info:
            CodeExecutionReward().score(["p"], [ADD], {"answer": ["x"]})
        assert str(info.value) == (
            "reward 'code': prompt 'p' has no tests. Give the data set one of the columns tests, test, test_list, "
            "test_cases, input_output (it has answer), or the reward tests=..."
        )

    def test_wrong_tests(self):
        for value, message in [
            (3, "tests cannot be int 3; allowed are Python code"),
            ([], "tests cannot be list []"),
            ("assert (", "the tests are not valid Python, line 1"),
            ("# nothing", "the tests are empty"),
            ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ]:
            with pytest.raises(RewardError) as info:
                parse_tests(value)
            assert message in str(info.value)
        with pytest.raises(RewardError, match="column 'tests' of prompt 'p': the tests are not valid Python"):
            CodeExecutionReward().score(["p"], [ADD], {"tests": ["assert ("]})

    def test_wrong_limits(self):
        with pytest.raises(ConfigError, match=r"Limits: seconds \(=0\) must be above 0"):
            CodeExecutionReward(tests="assert True", timeout=0)


class TestForms:
    @pytest.mark.parametrize(
        ("completion", "code"),
        [
            ("x = 1", "x = 1"),
            ("```\nx = 1\n```", "x = 1\n"),
            ("```python\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2\n"),
            ("```python\nx = 1\n```\nrun it:\n```bash\npython x.py\n```", "x = 1\n"),
            ("```python\nx = 1\n", "x = 1\n"),
            ("```bash\nls\n```", "```bash\nls\n```"),
        ],
    )
    def test_extract_code(self, completion, code):
        assert extract_code(completion) == code

    def test_split_tests(self):
        source = "import math\nassert f(1)\nx = 2\nassert f(x)\n"
        assert split_tests(source) == ["import math\nassert f(1)", "x = 2\nassert f(x)"]
        source = "def test_a():\n    assert f(1)\ndef helper(x):\n    return x\ndef test_b(n=1):\n    assert f(n)\n"
        assert [test.splitlines()[-1] for test in split_tests(source)] == ["test_a()", "test_b()"]
        assert split_tests("f(1)\nf(2)") == ["f(1)\nf(2)"]
        assert split_tests("assert f(1)\ncheck(f)") == ["assert f(1)", "check(f)"]

    def test_json_strings(self):
        assert parse_tests('["assert a", "assert b"]') == CodeTests(snippets=("assert a", "assert b"))
        assert parse_tests('[{"input": 1, "output": [2, 3]}]') == CodeTests(pairs=(("1", "2\n3"),))
        assert parse_tests("[check(x) for x in (1, 2)]") == CodeTests(snippets=("[check(x) for x in (1, 2)]",))


class TestCheating:
    @pytest.mark.parametrize(
        "code",
        [
            "import sys; sys.exit(0)",
            "raise SystemExit",
            "import os; os._exit(0)",
            "print('passed')\nprint([0, 'passed'])\nquit()",
            FORGED_RESULT,
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "import ctypes; ctypes.string_at(0)",
            "def add(a, b): raise SystemExit(0)",
            "def add(a, b):\n    import os\n    os._exit(0)",
            "def add(a, b:\n",
            "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\nimport time; time.sleep(0.2)",
        ],
    )
    def test_ending_early_passes_nothing(self, code):
        assert CodeExecutionReward(tests=["assert add(1, 2) == 3"], limits=ENOUGH).score(["p"], [code]) == [0.0]

    def test_status_zero_is_needed_for_output(self):
        tests = [{"input": "", "output": "3"}]
        reward = CodeExecutionReward(tests)
        assert reward.score(["p", "p"], ["print(3)", "print(3)\nraise ValueError"]) == [1.0, 0.0]


class TestLimits:
    def test_endless_loop(self):
        assert "took longer" in outcome_of("while True: pass", Limits(seconds=4.0))[-1]

    def test_one_endless_test_does_not_cost_the_others(self):
        code = "def f(x):\n    while x: pass\n    return 1"
        limits = Limits(seconds=6.0)
        results = run_tests(code, ["assert f(0)", "assert f(1)", "assert f(0)"], limits=limits).results
        assert results[0] == results[2] == "passed"
        assert "took longer" in results[1]

    def test_loop_that_catches_everything_is_killed(self):
        outcome = run_tests(CATCHES_EVERYTHING, ["pass"], limits=Limits(seconds=1.0))
        assert outcome.timed_out
        assert outcome.results == {}

    def test_sleeping_program_is_killed(self):
        outcome = run_program("import time\nprint('a', flush=True)\ntime.sleep(100)", limits=Limits(seconds=3.0))
        assert outcome.timed_out
        assert outcome.output == "a\n"

    def test_memory(self):
        assert "MemoryError" in outcome_of("x = bytearray(2 * 10**9)")[-1]
        assert "MemoryError" in outcome_of("x = []\nwhile True: x.append(bytearray(10**7))")[-1]

    def test_one_large_file(self):
        assert "File too large" in outcome_of("f = open('a', 'wb')\nwhile True: f.write(b'x' * 10**5)")[-1]

    def test_output_without_end(self):
        outcome = run_program("while True: print('x' * 1000)", limits=ENOUGH)
        assert len(outcome.output) <= ENOUGH.file_size

    def test_many_files(self, needs_namespaces):
        code = "for i in range(10**6):\n    with open(f'f{i}', 'wb') as f: f.write(b'x' * 10**6)"
        assert "No space left" in outcome_of(code)[-1]

    def test_open_files(self):
        assert "Too many open files" in outcome_of("kept = [open('a', 'w') for _ in range(1000)]")[-1]

    def test_fork_bomb_is_bounded(self, needs_namespaces):
        if os.geteuid() == 0 and not sandbox.isolation().drop_user:
            pytest.skip("root is exempt from the limit on processes, and nobody cannot run Python here")
        code = (
            "import os, time\nmade = 0\ntry:\n    for _ in range(500):\n        if os.fork() == 0:\n"
            "            time.sleep(60)\n        made += 1\nexcept OSError: pass\nprint(made)"
        )
        made = int(run_program(code, limits=ENOUGH).output)
        assert 0 < made <= ENOUGH.processes

    def test_no_process_is_left(self, needs_namespaces):
        marker = f"left-{time.time_ns()}"
        code = (
            f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            f"        os.execv({sys.executable!r}, ['{marker}', '-S', '-c', 'import time; time.sleep(60)'])\n"
            "time.sleep(0.3)"
        )
        run_program(code, limits=ENOUGH)
        alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _bytes(path)]
        assert alive == []


class TestIsolation:
    def test_network(self):
        said = outcome_of("import socket\nsocket.create_connection(('192.0.2.1', 9), timeout=1)")[-1]
        assert "unreachable" in said or "not allowed" in said
        with socket.create_server(("127.0.0.1", 0)) as server:  # bubblewrap has a loopback device of its own
            address = server.getsockname()
            said = outcome_of(f"import socket\nsocket.create_connection({address!r}, timeout=1)")[-1]
            assert "unreachable" in said or "not allowed" in said or "refused" in said
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()

    def test_environment_is_scrubbed(self, monkeypatch):
        monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
        outcome = run_program("import os, sys\nprint(sorted(os.environ), sys.argv, os.listdir('.'))")
        assert outcome.output == ("['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED', 'TMPDIR'] ['solution.py'] []\n")

    def test_installed_packages_are_out_of_reach(self):
        assert "No module named 'torch'" in outcome_of("import torch")[-1]

    def test_files_outside_cannot_be_written(self, needs_namespaces, tmp_path):
        target = tmp_path / "precious"
        target.write_text("kept")
        for code in (f"open({str(target)!r}, 'w')", f"import os\nos.remove({str(target)!r})"):
            assert -1 in outcome_of(code)
        assert target.read_text() == "kept"

    def test_other_processes_cannot_be_signalled(self, needs_namespaces):
        assert "ProcessLookupError" in outcome_of(f"import os\nos.kill({os.getpid()}, 0)")[-1]

    def test_no_temporary_folder_is_left(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        sandbox.isolation.cache_clear()  # nobody cannot reach this folder
        try:
            assert run_program("open('a', 'w').write('x')", limits=ENOUGH).status == 0
        finally:
            sandbox.isolation.cache_clear()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("how", [Isolation(False, False)])
    def test_without_namespaces_python_sockets_are_blocked(self, how):
        values = {"tests": ["pass"], "stdin": "", "limits": ENOUGH}
        code = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
        assert "is not allowed in the sandbox" in sandbox._run(code, how=how, **values).results[-1]
        assert sandbox._run(ADD, how=how, **values).results == {0: "passed"}

    def test_isolation_is_described(self):
        assert Isolation(True, True).describe() == (
            "sandbox (namespaces): no network, no sockets on disk, no other processes, no files but the system's and "
            "Python's (read-only), as nobody, total memory watched"
        )
        assert "Python-level network block only" in Isolation(False, False).describe()

    def test_a_sandbox_that_does_not_start_is_an_error(self, monkeypatch):
        monkeypatch.setattr(sandbox, "CHILD", Path("/no/such/file.py"))
        with pytest.raises(RewardError, match=r"the sandbox for code did not start: .*No such file"):
            sandbox._run(ADD, [], "", ENOUGH, Isolation(False, False))


def _bytes(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
