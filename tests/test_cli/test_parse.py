"""Command lines are made of settings: options have texts, old names are understood, errors use the command's name."""

import dataclasses
import importlib

import pytest

from eggroll.cli.kinds import RECIPES, load_recipe
from eggroll.cli.main import COMMANDS
from eggroll.cli.parse import field_texts, parse
from eggroll.cli.recipe import options_type
from eggroll.core.config import ESConfig
from eggroll.core.settings import about, from_json_values, may_change, setting, to_json_values
from eggroll.errors import ConfigError, RunError

KINDS = {name: lambda name=name: importlib.import_module(f"eggroll.cli.{name}").OPTIONS for name in COMMANDS}
KINDS |= {f"recipe {name}": lambda name=name: options_type(load_recipe(name)) for name in RECIPES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(ESConfig):
    """Settings for tests."""

    place: str = setting("here", flags=("-x", "--old-place"), resume=True)
    """Where :class:`eggroll.Thing` is, ``here`` or there."""
    inner: int = setting(3, hidden=True)
    """Not on the command line."""
    until: int = setting(5, resume=lambda options: options.place == "there")
    """When."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived(Base):
    """Another default, and nothing else about it."""

    place: str = "there"


@pytest.mark.parametrize("name", KINDS)
def test_every_option_has_a_text(name):
    kind = KINDS[name]()
    texts = field_texts(kind)
    shown = [field.name for field in dataclasses.fields(kind) if not about(kind, field.name).get("hidden")]
    assert [field for field in shown if not texts.get(field)] == []


def test_a_subclass_that_gives_another_default_keeps_the_rest():
    assert field_texts(Derived)["place"] == "Where eggroll.Thing is, here or there."
    assert about(Derived, "place")["flags"] == ("-x", "--old-place")
    options = parse(Derived, ["-x", "elsewhere", "-p", "8"], prog="eggroll test", description="")
    assert (type(options), options.place, options.population_size) == (Derived, "elsewhere", 8)
    assert parse(Derived, ["--old-place", "a"], prog="eggroll test", description="").place == "a"


def test_hidden_settings_are_no_options(capsys):
    with pytest.raises(SystemExit):
        parse(Base, ["--inner", "4"], prog="eggroll test", description="")
    assert "Unrecognized options" in capsys.readouterr().err


def test_what_cannot_work_is_said_of_the_command():
    with pytest.raises(ConfigError, match=r"^eggroll test: rank \(=0\) must be a whole number of at least 1$"):
        parse(Base, ["--rank", "0"], prog="eggroll test", description="")


def test_what_may_change_on_resume_is_asked_of_the_options():
    assert {"place", "generations"} <= may_change(Base())
    assert "until" not in may_change(Base())
    assert "until" in may_change(Derived())


def test_settings_make_the_round_trip_also_under_old_names():
    options = Derived(target_modules=("a", "b"), population_size=8)
    stored = to_json_values(options)
    assert stored["target_modules"] == ["a", "b"]
    assert from_json_values(Derived, stored, source="config.json") == options
    old = {("population" if key == "population_size" else key): value for key, value in stored.items()}
    old["old_place"] = old.pop("place")
    assert from_json_values(Derived, old, source="config.json") == options
    assert from_json_values(Derived, {**old, "gone": 1}, ignored=("gone",), source="config.json") == options
    with pytest.raises(RunError, match=r"config\.json has settings that this version does not know: gone, lost"):
        from_json_values(Derived, {**old, "lost": 2, "gone": 1}, source="config.json")
