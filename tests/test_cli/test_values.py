"""What stands behind a flag is refused in plain words, whatever the option and the command."""

import dataclasses
import importlib
import re
from typing import Literal, get_type_hints

import pytest

from eggroll.cli.kinds import RECIPES, load_recipe
from eggroll.cli.main import COMMANDS, load, main, options_of
from eggroll.cli.parse import parse
from eggroll.cli.recipe import AllOptions, options_type
from eggroll.core.settings import about, flag_of, setting
from eggroll.errors import EggrollError

KINDS = {name: lambda name=name: importlib.import_module(f"eggroll.cli.{name}").OPTIONS for name in COMMANDS}
KINDS |= {f"recipe {name}": lambda name=name: options_type(load_recipe(name)) for name in RECIPES}
KINDS |= {"recipe all": lambda: AllOptions}
INNER = re.compile(
    r"typing|Literal|Union|Optional|NoneType|<class|invalid literal|could not convert|instantiated|'None'"
)
"""Words of Python that are no answer to a person who has typed something wrong."""
TEXT = {str, str | None, tuple[str, ...], tuple[str, ...] | None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    """One setting of each kind."""

    size: int | Literal["auto"] = setting("auto", flags=("-p", "--population"))
    """A number or a word."""
    rate: float | None = None
    """A number or nothing."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Two numbers."""
    order: Literal["up", "down"] | None = None
    """A word or nothing."""
    chat: bool | None = None
    """Yes, no or neither."""
    place: str = setting("here", flags=("-o",))
    """Text."""
    names: tuple[str, ...] = ()
    """Texts."""
    switch: bool = False
    """On or off."""


def refused(kind, arguments, prog):
    """Why a command line is refused: the status, or what the settings say; empty if it is not."""
    try:
        parse(kind, arguments, prog=prog, description="")
    except (SystemExit, EggrollError) as error:
        return str(error)
    return ""


def read(*arguments):
    return parse(Several, arguments, prog="eggroll test", description="")


@pytest.mark.parametrize("name", KINDS)
def test_no_option_answers_a_wrong_word_with_types_of_python(name, capsys):
    kind = KINDS[name]()
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if not about(kind, field.name).get("hidden")]
    places = ["x" for field in fields if about(kind, field).get("positional")]
    for field in (field for field in fields if not about(kind, field).get("positional")):
        flag, plain = flag_of(field), hints[field] in TEXT
        for given in ([flag, "wr-ong", "wr-ong"], [flag]):
            wrong = refused(kind, [*places[:1], *given], f"eggroll {name}")
            assert wrong or plain or hints[field] is bool, flag
            assert not INNER.search(wrong), wrong
            said = capsys.readouterr().err
            assert not INNER.search(said), said
            if not plain and hints[field] is not bool:
                takes = f"{flag} takes .*, not 'wr-ong'" if len(given) > 1 else f"{flag} needs .* after it"
                assert re.match(takes, said), said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-p", "four"], "-p takes a whole number or auto, not 'four'"),
        (["-pfour"], "-p takes a whole number or auto, not 'four'"),
        (["--population=4.5"], "--population takes a whole number or auto, not '4.5'"),
        (["--size", "atuo"], "--size takes a whole number or auto, not 'atuo'; did you mean auto?"),
        (["--rate", "fast"], "--rate takes a number, not 'fast'"),
        (["--rate", "-p", "4"], "--rate needs a number after it"),
        (["--rate"], "--rate needs a number after it"),
        (["--betas", "0.9", "x"], "--betas takes 2 numbers, such as 0.9 0.99, not 'x'"),
        (["--betas", "0.9"], "--betas needs 2 numbers after it"),
        (["--order", "sideways"], "--order takes up or down, not 'sideways'"),
        (["--chat", "perhaps"], "--chat takes yes or no, not 'perhaps'"),
        (
            ["--rate", "a", "--size", "b"],
            "--rate takes a number, not 'a'\n--size takes a whole number or auto, not 'b'",
        ),
    ],
)
def test_what_was_given_and_what_is_allowed(given, said, capsys):
    with pytest.raises(SystemExit) as left:
        read(*given)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"{said}\neggroll test --help-all shows every option\n"


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (["-p", "8"], {"size": 8}),
        (["-p8"], {"size": 8}),
        (["-p=auto", "--rate", "-1e-3"], {"size": "auto", "rate": -1e-3}),
        (["--rate", "None", "--order", "None"], {}),
        (["--betas", "0.5", "-0.6", "--order=up"], {"betas": (0.5, -0.6), "order": "up"}),
        (["--chat", "yes"], {"chat": True}),
        (["--chat=No", "--switch"], {"chat": False, "switch": True}),
        (["-o", "8", "--names", "a", "b", "-p", "4"], {"place": "8", "names": ("a", "b"), "size": 4}),
        (["-oruns/x"], {"place": "runs/x"}),
        (["--place", "a=b"], {"place": "a=b"}),
    ],
)
def test_what_can_be_read_is_read(given, values):
    assert read(*given) == dataclasses.replace(Several(), **values)


def test_a_command_says_it(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "tiny", "-p", "four", "--sigma", "small"])
    said = capsys.readouterr().err
    assert said.splitlines()[:2] == [
        "-p takes a whole number or auto, not 'four'", "--sigma takes a number or auto, not 'small'",
    ]  # fmt: skip


@pytest.mark.parametrize(("flag", "kind"), [("--load-in-4bit", "int4"), ("--load_in_8bit", "int8")])
def test_flags_of_transformers_are_understood(flag, kind):
    for command, more in (("tune", []), ("eval", ["--task", "zeros"]), ("chat", [])):
        options = options_of(load(command), ["tiny", *more, flag], prog=f"eggroll {command}")
        assert options.quantize == kind


def test_they_stay_unknown_where_nothing_is_quantized(capsys):
    with pytest.raises(SystemExit):
        options_of(load("rl"), ["--env", "CartPole-v1", "--load-in-4bit"], prog="eggroll rl")
    assert "Unrecognized options: --load-in-4bit" in capsys.readouterr().err
