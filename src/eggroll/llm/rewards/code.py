"""Rewards for code: the fraction of tests that it passes."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm.rewards import sandbox
from eggroll.llm.rewards.base import Need, Prompt, Reward, describe, shown
from eggroll.llm.rewards.sandbox import Limits

TEST_COLUMNS = ("tests", "test", "test_list", "test_cases", "input_output")
"""Where tests are looked for, in this order; MBPP, HumanEval and APPS use such names."""

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Tests:
    """The tests of one task: Python that raises where the code is wrong, or inputs with the outputs they must give."""

    snippets: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()


class CodeExecutionReward(Reward):
    """Run the code of a completion against tests; the score is the fraction that passes, 0 to 1.

    The code is the last fenced Python block of the completion, or all of it. Tests come from a column of the data set
    (``tests``, ``test``, ``test_list``, ``test_cases``, ``input_output``) or are the same for all:

    - a list of Python snippets, each one test, run after the code and in its names: ``["assert add(1, 2) == 3"]``;
    - a string of Python: each ``assert`` at its top level and each function ``test_*`` is one test, and without any
      of these the whole is one (HumanEval's ``check`` is called with the column ``entry_point``);
    - standard input and output: ``[{"input": "1 2", "output": "3"}]`` or ``{"inputs": [...], "outputs": [...]}``. The
      code is then a whole program, and outputs are compared without white space at line ends.

    Any of these may also be a JSON string. Code runs in :mod:`eggroll.llm.rewards.sandbox`: limits on time, memory,
    files and processes, and no network, but no boundary for hostile code (:attr:`notes` says which protections are in
    force on this machine); in particular, code that goes looking for
    the tests in its own process can find them, so read what scores high. Since times are limited, a score can depend
    on how busy the machine is: give slow tests a generous ``timeout``.

    Args:
        tokenizer: kept for symmetry with the other rewards; ``None`` will do.
        tests: the tests of every completion, if the data set has no column of them.
        timeout: seconds of one run (of all snippets together, or of one input).
        memory_mb: address space of one process and memory of all processes of a run, in MiB.
        setup: Python that is put in front of the code, for example imports.
        workers: runs at the same time; the number of processors if not given.
        limits: all limits at once, instead of ``timeout`` and ``memory_mb``.
    """

    needs: Need = "text"
    name = "code"

    def __init__(
        self,
        tokenizer: Any = None,
        tests: Any = None,
        *,
        timeout: float = 5.0,
        memory_mb: int = 512,
        setup: str = "",
        workers: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        if tests is None and isinstance(tokenizer, str | Sequence | Mapping):
            tokenizer, tests = None, tokenizer
        self.tokenizer = tokenizer
        self.tests = None if tests is None else parse_tests(tests)
        self.setup = setup
        self.workers = workers or os.cpu_count() or 1
        self.limits = limits or Limits(seconds=timeout, memory=memory_mb * 2**20)

    @property
    def notes(self) -> list[str]:
        """Which protections are in force, one line; see :mod:`eggroll.llm.rewards.sandbox`."""
        return [sandbox.isolation().describe()]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """One score per completion; see :meth:`Reward.score`."""
        jobs = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[index] for name, values in (columns or {}).items()}
            jobs.append((extract_code(completion), self._tests_of(row, prompt)))
        # members of a population often write the same thing
        distinct = list(dict.fromkeys(jobs))
        sandbox.isolation()
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            scores = dict(zip(distinct, pool.map(lambda job: self.fraction(*job), distinct), strict=True))
        return [scores[job] for job in jobs]

    def fraction(self, code: str, tests: Tests) -> float:
        """The fraction of tests that one piece of code passes."""
        if not code.strip():
            return 0.0
        if self.setup:
            code = f"{self.setup}\n{code}"
        passed = 0
        if tests.snippets:
            outcome = sandbox.run_tests(code, list(tests.snippets), limits=self.limits)
            passed = sum(outcome.results.get(number) == "passed" for number in range(len(tests.snippets)))
        for given, expected in tests.pairs:
            outcome = sandbox.run_program(code, stdin=given, limits=self.limits)
            passed += outcome.status == 0 and not outcome.timed_out and _same(outcome.output, expected)
        return passed / (len(tests.snippets) + len(tests.pairs))

    def _tests_of(self, row: Mapping[str, Any], prompt: Prompt) -> Tests:
        column = next((name for name in TEST_COLUMNS if row.get(name)), None)
        if column is None:
            if self.tests is None:
                raise RewardError(
                    f"reward {self.name!r}: prompt {shown(prompt)} has no tests. Give the data set one of the columns "
                    f"{', '.join(TEST_COLUMNS)} (it has {', '.join(sorted(row)) or 'none'}), or the reward tests=..."
                )
            return self.tests
        try:
            return parse_tests(row[column], entry_point=row.get("entry_point"))
        except RewardError as error:
            raise RewardError(f"reward {self.name!r}: column {column!r} of prompt {shown(prompt)}: {error}") from error


def extract_code(completion: str) -> str:
    """The last fenced block that is Python (or says nothing of its language), else the whole completion.

    A block that the model did not close reaches to the end.
    """
    blocks = [
        code for language, code in FENCE.findall(completion) if language.lower() in ("", "python", "py", "python3")
    ]
    return blocks[-1] if blocks else completion


def parse_tests(value: Any, *, entry_point: str | None = None) -> Tests:
    """Tests from any of the forms that :class:`CodeExecutionReward` knows.

    Raises:
        RewardError: none of them, or no test in it.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # Python may start with a bracket, too
            value = json.loads(value)
    if isinstance(value, str):
        return Tests(snippets=tuple(split_tests(value, entry_point=entry_point)))
    if isinstance(value, Mapping):
        if "inputs" in value and "outputs" in value:
            if len(value["inputs"]) != len(value["outputs"]):
                raise RewardError(f"{len(value['inputs'])} inputs but {len(value['outputs'])} outputs")
            value = [{"input": i, "output": o} for i, o in zip(value["inputs"], value["outputs"], strict=True)]
        else:
            value = [value]
    if isinstance(value, Sequence) and value:
        if all(isinstance(item, str) for item in value):
            return Tests(snippets=tuple(value))
        if all(isinstance(item, Mapping) and {"input", "output"} <= set(item) for item in value):
            return Tests(pairs=tuple((_text(item["input"]), _text(item["output"])) for item in value))
    raise RewardError(
        f"tests cannot be {describe(value)}; allowed are Python code, a list of Python snippets, or input/output pairs "
        '[{"input": "1 2", "output": "3"}]'
    )


def split_tests(source: str, *, entry_point: str | None = None) -> list[str]:
    """The single tests in a string of Python. What stands before a test is run together with it.

    Raises:
        RewardError: it is not valid Python, or empty.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise RewardError(f"the tests are not valid Python, line {error.lineno}: {error.msg}") from error
    if not body:
        raise RewardError("the tests are empty")
    tests: list[str] = []
    before: list[ast.stmt] = []
    for node in body:
        before.append(node)
        if isinstance(node, ast.Assert):
            tests.append(_source(before))
            before = []
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test") and not _needs_arguments(node):
            call = ast.Expr(ast.Call(ast.Name(node.name, ast.Load()), [], []))
            tests.append(_source([*before, call]))
            before = []
    if tests and not any(isinstance(node, ast.Expr) for node in before):
        return tests
    # no assertion at the top level, or something is called after the last: that is a test of its own
    ending = _source(before)
    if entry_point and any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in body):
        ending += f"\ncheck({entry_point})"
    return [*tests, ending]


def _needs_arguments(node: ast.FunctionDef) -> bool:
    return len(node.args.args) + len(node.args.posonlyargs) > len(node.args.defaults)


def _source(nodes: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(body=nodes, type_ignores=[])))


def _text(value: Any) -> str:
    """An input or output as text; a list is lines."""
    return "\n".join(str(line) for line in value) if isinstance(value, list) else str(value)


def _same(output: str, expected: str) -> bool:
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
