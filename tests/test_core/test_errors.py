"""The tree of errors: each is the standard error it replaces, and survives a trip between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from eggroll import errors
from eggroll._optional import install_line, require

STANDARD = {
    "EggrollError": Exception,
    "ConfigError": ValueError,
    "SelectionError": ValueError,
    "DataError": ValueError,
    "ModelError": OSError,
    "MissingExtraError": ImportError,
    "UnsupportedOperationError": RuntimeError,
    "EngineDiedError": OSError,
    "RewardError": RuntimeError,
    "MemoryBudgetError": MemoryError,
    "RunError": RuntimeError,
    "CheckpointError": RuntimeError,
    "RunWriteError": OSError,
}


def test_every_error_is_listed_here():
    public = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert sorted(STANDARD) == sorted(public)


@pytest.mark.parametrize("name", sorted(STANDARD))
def test_standard_bases(name):
    cls = getattr(errors, name)
    assert issubclass(cls, errors.EggrollError)
    assert issubclass(cls, STANDARD[name])
    assert cls.__doc__


@pytest.mark.parametrize("name", sorted(STANDARD))
@pytest.mark.parametrize("clone", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_errors_survive_copying(name, clone):
    error = getattr(errors, name)("population_size (=7) must be even; use 8")
    back = clone(error)
    assert type(back) is type(error)
    assert str(back) == str(error) == "population_size (=7) must be even; use 8"


def test_narrow_errors_are_their_wide_ones():
    assert issubclass(errors.SelectionError, errors.ConfigError)
    assert issubclass(errors.EngineDiedError, errors.ModelError)
    assert issubclass(errors.CheckpointError, errors.RunError)
    assert issubclass(errors.RunWriteError, errors.RunError)


def test_one_problem_is_a_sentence_and_several_are_a_list():
    assert str(errors.ConfigError.from_problems("ESConfig", ["a is wrong"])) == "ESConfig: a is wrong"
    several = errors.SelectionError.from_problems("Settings", ["a is wrong", "b is wrong"])
    assert type(several) is errors.SelectionError
    assert str(several) == "Settings has 2 problems:\n  - a is wrong\n  - b is wrong"


def test_a_missing_extra_names_its_pip_line():
    with pytest.raises(errors.MissingExtraError) as caught:
        require("no_such_module_at_all", extra="vllm")
    assert str(caught.value) == (
        "'no_such_module_at_all' is needed here and could not be imported (No module named 'no_such_module_at_all'). "
        f"Install it with: {install_line('vllm')}"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_what_is_there_is_imported():
    assert require("json.decoder", extra="llm").JSONDecoder
