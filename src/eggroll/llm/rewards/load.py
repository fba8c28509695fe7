"""Rewards from what a user gives: a word, a file, a lambda, a dotted name, a function.

A function's parameters say which convention it follows:

    score(text) -> float                                  one generated text (further parameters: columns by name)
    reward(prompts, completions, **columns) -> list       TRL's convention, a whole batch
    reward_fn(outputs, prompts) -> list                   the same with other names
    reward_fn(model, inputs) -> float                     the model itself, one member at a time
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from eggroll.errors import RewardError
from eggroll.llm import tasks
from eggroll.llm.rewards.base import Reward, function_name
from eggroll.llm.rewards.custom import CustomReward
from eggroll.llm.rewards.functions import FunctionReward
from eggroll.llm.rewards.importing import import_file, import_module
from eggroll.llm.rewards.multi import MultiReward
from eggroll.llm.rewards.perplexity import PerplexityReward
from eggroll.llm.rewards.text import TextReward

CONVENTIONS = (
    "score(text) -> float, reward(prompts, completions, **columns) -> list[float], "
    "reward_fn(outputs, prompts) -> list[float] or reward_fn(model, inputs) -> float"
)
KNOWN_NAME = re.compile(r"score|reward.*|.*reward(_fn|_func|_function)?")
BATCH_PARAMETERS = {"completions", "outputs", "completion_ids", "completions_ids", "environments"}


def load_reward(spec: str, tokenizer: Any) -> Reward:
    """The reward that a command line names.

    Args:
        spec: ``perplexity``; the name of a task (``countdown``, ``reasoning-gym:chain_sum``); a Python file
            (``score.py``, or ``score.py:function``); ``lambda text: ...`` (with ``re``, ``math`` and ``json`` at
            hand); or ``package.module:function``.
        tokenizer: the model's tokenizer.

    Raises:
        RewardError: nothing of that name, no reward function in it, or it raises when it is loaded.
    """
    spec = spec.strip()
    if spec == "perplexity":
        return PerplexityReward(tokenizer)
    if spec.startswith("lambda"):
        return _from_lambda(spec, tokenizer)
    if tasks.is_task(spec):
        return _from_task(spec, tokenizer)
    path, _, function = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    if path.endswith(".py") or "/" in path:
        return _from_file(Path(path).expanduser(), function or None, tokenizer)
    if function:
        return _from_module(path, function, tokenizer)
    near = difflib.get_close_matches(spec, [*tasks.names(), "perplexity"], n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise RewardError(f"unknown reward {spec!r}. {hint}{_known()}")


def as_reward(value: Any, tokenizer: Any) -> Reward:
    """A reward from a reward, a function, a specification for :func:`load_reward`, or a list of these.

    A list of functions is summed as TRL's ``reward_funcs``; other lists are summed with equal weights, or with those of
    pairs: ``[("countdown", 1.0), (JudgeReward(...), 0.5)]``.

    Raises:
        RewardError: it is none of these.
    """
    if isinstance(value, Reward):
        for part, _ in value.parts:  # one that was loaded before the model's tokenizer
            if getattr(part, "tokenizer", part) is None:
                setattr(part, "tokenizer", tokenizer)  # noqa: B010  (a reward may have any attributes)
        return value
    if isinstance(value, str | Path):
        return load_reward(str(value), tokenizer)
    if hasattr(value, "to_reward"):  # a world with its reward
        return value.to_reward(tokenizer)
    if callable(value):
        return _from_function(value, tokenizer, function_name(value))
    if isinstance(value, Sequence) and value:
        if all(_is_pair(item) for item in value):
            return MultiReward([(as_reward(item, tokenizer), weight) for item, weight in value])
        rewards = [as_reward(item, tokenizer) for item in value]
        if all(isinstance(reward, FunctionReward) for reward in rewards):
            functions = [function for reward in rewards for function in getattr(reward, "functions", ())]
            return FunctionReward(functions, tokenizer=tokenizer)
        return rewards[0] if len(rewards) == 1 else MultiReward([(reward, 1.0) for reward in rewards])
    raise RewardError(f"a reward cannot be {value!r}; allowed are a Reward, a function or a list of them. {_known()}")


def _is_pair(item: Any) -> bool:
    """Whether it is a reward with its weight."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int | float)


def _from_lambda(spec: str, tokenizer: Any) -> Reward:
    try:
        function = eval(spec, {"re": re, "math": math, "json": json})
    except (Exception, SystemExit) as error:
        raise RewardError(f"the reward {spec!r} is not a valid lambda: {error}. Write for example "
                          "\"lambda text: 1.0 if 'yes' in text else 0.0\"") from error  # fmt: skip
    return _from_function(function, tokenizer, spec)


def _from_file(path: Path, function: str | None, tokenizer: Any) -> Reward:
    if not path.is_file():
        near = []
        if path.parent.is_dir():
            files = sorted(file.name for file in path.parent.glob("*.py"))
            near = difflib.get_close_matches(path.name, files, n=3, cutoff=0.5) or files[:5]
        there = f"Python files in {path.parent}: {', '.join(near)}" if near else f"{path.parent} has no Python file"
        raise RewardError(f"reward file {path} does not exist. {there}. {_known()}")
    try:
        module = import_file(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RewardError(f"reward file {path} {_raised(error, path)}") from error
    if module is None:
        raise RewardError(f"reward file {path} is not a Python file; its name must end with .py")
    return _from_namespace(module, f"reward file {path}", function, tokenizer)


def _from_module(path: str, function: str, tokenizer: Any) -> Reward:
    try:
        module = import_module(path)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"the module of the reward '{path}:{function}' cannot be imported: {type(error).__name__}: {error}. "
            "Give package.module:function, with the package installed or in the current folder"
        ) from error
    return _from_namespace(module, f"module {path}", function, tokenizer)


def _from_task(name: str, tokenizer: Any) -> Reward:
    task = tasks.get_task(name)
    if task.world is not None:
        from eggroll.llm.worlds.reward import WorldReward  # which imports this package

        return WorldReward(task.world, name=task.name)
    return FunctionReward(task.reward, tokenizer=tokenizer, name=task.name)


def _from_namespace(module: ModuleType, what: str, function: str | None, tokenizer: Any) -> Reward:
    values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    if function is not None:
        if function not in values:
            near = ", ".join(sorted(name for name, value in values.items() if _is_function(value))) or "none"
            raise RewardError(f"{what} has no {function!r}; functions in it: {near}")
        return _from_value(values[function], tokenizer, function, what)
    known = {
        name: value
        for name, value in values.items()
        if KNOWN_NAME.fullmatch(name) and (_is_function(value) or isinstance(value, Reward))
    }
    # what a file imports may be its helpers; it counts only if the file defines nothing itself
    own = {name: value for name, value in known.items() if getattr(value, "__module__", "") == module.__name__}
    made = {name: value for name, value in known.items() if isinstance(value, Reward)}
    found: dict[str, Any] = made or own or known
    if not found:
        names = ", ".join(sorted(name for name, value in values.items() if _is_function(value))) or "none"
        raise RewardError(
            f"{what} has no reward function; functions in it: {names}. Define one of {CONVENTIONS}; a name that "
            f"starts or ends with 'reward' counts too, and '{what.split()[-1]}:name' takes any function"
        )
    exact = [name for name in ("reward", "reward_fn", "reward_func", "score") if name in found]
    if "reward" in exact:
        exact = ["reward"]  # a score beside it is what it is made of
    if len(exact) == 1 or len(found) == 1:
        name = exact[0] if exact else next(iter(found))
        return _from_value(found[name], tokenizer, name, what)
    if exact or not all(_is_batch(value) for value in found.values()):
        names = ", ".join(sorted(found))
        raise RewardError(
            f"{what} has several reward functions: {names}. Say which one is meant: '{what.split()[-1]}:{min(found)}'"
        )
    return FunctionReward(list(found.values()), tokenizer=tokenizer)


def _from_value(value: Any, tokenizer: Any, name: str, what: str) -> Reward:
    if isinstance(value, Reward):
        return value
    if not callable(value):
        raise RewardError(f"{name!r} of {what} is a {type(value).__name__}, not a function")
    return _from_function(value, tokenizer, name)


def _from_function(function: Callable[..., Any], tokenizer: Any, name: str) -> Reward:
    parameters = _parameters(function, name)
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if _is_batch(function):
        return FunctionReward(function, tokenizer=tokenizer, name=name)
    if required[:1] == ["model"]:
        return CustomReward(function, name=name)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if positional and (len(required) <= 1 or required[0] in ("text", "completion", "output", "answer", "response")):
        return TextReward(tokenizer, function, name=name)
    raise RewardError(
        f"the reward function {name!r} has the parameters ({', '.join(p.name for p in parameters)}), from which its "
        f"convention cannot be told. Known are {CONVENTIONS}; or wrap it: TextReward, FunctionReward, CustomReward"
    )


def _parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the parameters of the reward function {name!r} cannot be read ({error}); "
            f"wrap it: lambda text: {name}(text)"
        ) from error


def _is_function(value: Any) -> bool:
    return callable(value) and not inspect.isclass(value)


def _is_batch(value: Any) -> bool:
    """Whether a function takes a batch, by the names of its parameters."""
    if not _is_function(value):
        return False
    try:
        return bool(BATCH_PARAMETERS & set(inspect.signature(value).parameters))
    except (TypeError, ValueError):
        return False


def _raised(error: BaseException, path: Path) -> str:
    """What went wrong while a file was loaded, with its line."""
    if isinstance(error, SyntaxError):
        return f"is not valid Python, line {error.lineno}: {error.msg}"
    own, frames = path.resolve(), traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == own]
    where = f" at line {lines[-1]}" if lines else ""
    return f"raised {type(error).__name__}{where} while it was loaded: {error}"


def _known() -> str:
    shipped = ", ".join([*tasks.names(), "reasoning-gym:NAME"])
    return (
        f"A reward is 'perplexity', a task of eggroll ({shipped}), a Python file, 'lambda text: ...' or "
        "'package.module:function'"
    )
