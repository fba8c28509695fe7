"""``--help`` fits two screens and names every option; ``--help-all`` shows each one with its whole text."""

import dataclasses
import re

import pytest
from test_cli.test_parse import KINDS

from eggroll.cli.helping import FIRST, GROUPS
from eggroll.cli.kinds import RECIPES, load_recipe
from eggroll.cli.main import COMMANDS, load
from eggroll.cli.parse import field_texts, parse
from eggroll.cli.recipe import options_type
from eggroll.core.settings import about, flag_of, setting

TWO_SCREENS = 100
PROGS = [*COMMANDS, *(f"recipe {name}" for name in RECIPES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """Options for tests."""

    model: str = setting(positional="MODEL")
    """What is asked."""
    rounds: int = setting(3, flags=("-n", "--turns_of_it"))
    """How often. Never mind why."""
    where: str | None = None
    """A place (default: here; or there)."""
    fast: bool = True
    """Hurry."""
    inner: int = setting(3, hidden=True)
    """Not on the command line."""


def shown_fields(kind):
    return [field.name for field in dataclasses.fields(kind) if not about(kind, field.name).get("hidden")]


def helped(capsys, kind, *arguments):
    with pytest.raises(SystemExit) as left:
        parse(kind, arguments, prog="eggroll test", description="Try it.")
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("prog", PROGS)
def test_help_fits_two_screens_and_names_every_option(prog, eggroll, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    kind = KINDS[prog]()
    short = eggroll(*prog.split(), "--help").out
    whole = eggroll(*prog.split(), "--help-all").out
    assert len(short.splitlines()) <= TWO_SCREENS
    assert max(map(len, short.splitlines())) <= 100
    if len(shown_fields(kind)) > 6:
        assert "--help-all" in short.splitlines()[0]
    for name in shown_fields(kind):
        if not about(kind, name).get("positional"):
            for text in (short, whole):
                assert re.search(rf"(?<![\w-]){flag_of(name)}(?![\w-])", text), name
        assert field_texts(kind)[name].split()[-1] in whole


def test_no_option_is_named_twice(eggroll, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    entries = [re.split(r"(?<=\S)  ", line)[0] for line in eggroll("tune", "--help-all").out.splitlines()]
    flags = [word for entry in entries if entry.startswith("  -") for word in re.findall(r"(?<![\w-])--[a-z-]+", entry)]
    assert len(flags) == len(set(flags))


def test_every_option_has_its_topic():
    topics = [name for _, common, rare in GROUPS for name in (*common, *rare)]
    assert len(topics) == len(set(topics))
    kinds = [*(load(name).OPTIONS for name in COMMANDS), *(options_type(load_recipe(name)) for name in RECIPES)]
    options = {name for kind in kinds for name in shown_fields(kind) if not about(kind, name).get("positional")}
    assert options - set(topics) == set()
    assert set(topics) - options == {"config"}


@pytest.mark.parametrize("command", sorted(set(FIRST) - {"recipe"}))
def test_the_five_that_matter_come_first(command, eggroll, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert len(FIRST[command]) == 5
    shown = eggroll(command, "--help").out.partition("The options that matter first:\n")[2].partition("\n\n")[0]
    found = [re.search(r"--[a-z-]+", line)[0] for line in shown.splitlines() if line.startswith("  -")]
    assert found == [flag_of(name) for name in FIRST[command]]


def test_what_an_entry_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = [" ".join(line.split()) for line in helped(capsys, Small, "-h").splitlines()]
    assert lines == [
        "usage: eggroll test MODEL [OPTIONS]", "", "Try it.", "", "MODEL What is asked.", "", "Options:",
        "-n, --rounds N How often. Never mind why. [3]",
        "--where TEXT A place (default: here; or there).",
        "--fast Hurry. [yes]",
    ]  # fmt: skip
    whole = helped(capsys, Small, "m", "--help-all", "-n", "4")
    assert "-n, --rounds, --turns-of-it N" in whole
    assert "--fast, --no-fast" in whole


def test_help_has_the_defaults_of_a_task(eggroll, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = " ".join(eggroll("tune", "--task", "countdown", "--help").out.split())
    assert "--system TEXT A system prompt [" in shown or "--max-tokens N Longest completion, in tokens [" in shown
    assert shown != " ".join(eggroll("tune", "--help").out.split())
