"""Environments by name.

A name is ``library/id``, such as ``navix/Navix-DoorKey-8x8-v0``, optionally with ``?option=value`` behind it. Shorter
forms follow one rule:

1. The library is the word before the first ``/`` or ``-`` (``navix-...``); ``gym/`` and ``gymnasium/`` are gymnasium.
2. The id is compared without regard to case and to anything that is no letter or digit, and every part of it that is
   the same for all or most of its library can be left out: the version (``-v0``), the library's own name
   (``Navix-``, ``Craftax-``), ``Symbolic`` and ``AutoReset`` of Craftax, the size of a level of Kinetix (``l/``), the
   suite of gymnax (``-MinAtar``). What remains has to match, a version that is given too: ``navix-DoorKey-8x8``,
   ``craftax-classic``, ``kinetix-hard_pinball``, ``brax/InvertedDoublePendulum``. The paper's sixteen go first; among
   others, a short form that fits several ids is an error.
3. Without a library, a name is tried as one of the paper's sixteen, an id of gymnax's own, an id that gymnasium has
   registered (``HalfCheetah-v5``), then as a short form of the sixteen (``ant``, ``hard_pinball``).

So ``CartPole-v1`` is gymnax's and ``gym/CartPole-v1`` gymnasium's.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from eggroll._command import typed
from eggroll._optional import install_line, require
from eggroll.errors import ConfigError
from eggroll.rl.envs.base import Environment

PAPER = (
    "CartPole-v1",
    "Pendulum-v1",
    "brax/ant",
    "brax/humanoid",
    "brax/inverted_double_pendulum",
    "craftax/Craftax-Classic-Symbolic-AutoReset-v1",
    "craftax/Craftax-Symbolic-AutoReset-v1",
    "jumanji/Game2048-v1",
    "jumanji/Knapsack-v1",
    "jumanji/Snake-v1",
    "kinetix/l/hard_pinball",
    "kinetix/m/h17_thrustcontrol_left",
    "kinetix/s/h1_thrust_over_ball",
    "navix/Navix-DoorKey-8x8-v0",
    "navix/Navix-Dynamic-Obstacles-6x6-Random-v0",
    "navix/Navix-FourRooms-v0",
)
"""The sixteen environments of the paper, by their canonical names."""

HOW_TO_LIST = f"'{typed()} rl --list' shows the names"
GYMNAX_OWN = re.compile(r"(CartPole|Pendulum|Acrobot)-v1|MountainCar(Continuous)?-v0|.+-(MinAtar|bsuite|misc)")
VERSION = r"-v\d+$"


@dataclass(frozen=True)
class _Library:
    """Where a library's adapter is, which parts of its ids can be left out, and the options with their values."""

    adapter: str
    extra: str = "rl"
    droppable: tuple[str, ...] = (VERSION,)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


LIBRARIES = {
    "gymnax": _Library("GymnaxEnvironment", droppable=(VERSION, "-(MinAtar|bsuite|misc)$")),
    "brax": _Library("BraxEnvironment", options={"backend": ("generalized", "spring", "positional", "mjx")}),
    "craftax": _Library("CraftaxEnvironment", droppable=(VERSION, "^Craftax-?", "-?Symbolic", "-?AutoReset")),
    "jumanji": _Library("JumanjiEnvironment"),
    "kinetix": _Library(
        "KinetixEnvironment",
        extra="kinetix",
        droppable=("^[sml]/",),
        options={"actions": ("multi_discrete", "discrete", "continuous")},
    ),
    "navix": _Library("NavixEnvironment", droppable=(VERSION, "^Navix-")),
}


class Row(NamedTuple):
    """One line of the list: canonical name, library, and ``installed`` or what installs it."""

    name: str
    library: str
    status: str


def make(name: str, **options: str) -> Environment:
    """The environment that a name means.

    Args:
        name: see the rule at the top; ``brax/ant?backend=spring`` gives an option in the name.
        options: the same options as keywords: ``backend`` of brax, ``actions`` of Kinetix.

    Raises:
        ConfigError: no such environment or option, or the name is gymnasium's, which is not written in JAX.
        MissingExtraError: the library is not installed.
    """
    library, id = resolve(name)
    if library == "gymnasium":
        raise ConfigError(f"{name!r} is an environment of gymnasium, which cannot be compiled; {HOW_TO_LIST} that can")
    known = LIBRARIES[library]
    chosen = _options(name, library, options)
    require("jax", extra=known.extra)
    require(library, extra=known.extra)
    adapter = importlib.import_module(f"eggroll.rl.envs.{library}_env")
    written = [f"{key}={value}" for key, value in chosen.items() if value != known.options[key][0]]
    canonical = "?".join([_canonical(library, id), *(["&".join(written)] if written else [])])
    return cast(Environment, getattr(adapter, known.adapter)(id, canonical, **chosen))


def resolve(name: str) -> tuple[str, str]:
    """``(library, id)`` of a name, the library one of ``LIBRARIES`` or ``gymnasium`` (whose ids are not checked).

    The paper's environments are resolved without importing their library.

    Raises:
        ConfigError: no such environment.
        MissingExtraError: the library that would have to know is not installed.
    """
    bare = name.strip().partition("?")[0]
    if found := re.fullmatch(r"(?:gym|gymnasium)/(.+)", bare, re.IGNORECASE):
        return "gymnasium", found[1]
    if found := re.fullmatch(rf"({'|'.join(LIBRARIES)})(?:[/-](.*))?", bare, re.IGNORECASE):
        return found[1].lower(), _find(name, found[1].lower(), found[2] or "")
    if bare in PAPER or GYMNAX_OWN.fullmatch(bare):
        return "gymnax", bare
    gymnasium = _gymnasium_ids()
    if bare in gymnasium:
        return "gymnasium", bare
    paper = [(library, id) for library in LIBRARIES for id in _paper_ids(library)]
    short = [(library, id) for library, id in paper if _plain(bare) and _matches(bare, [id], library)]
    if len(short) == 1:
        return short[0]
    names = {_plain(re.sub(VERSION, "", id)): id for id in gymnasium}
    for library, id in paper:
        names[_shortest(id, library)] = names[library + _shortest(id, library)] = _canonical(library, id)
    where = "" if gymnasium else " among those known without gymnasium, which is not installed"
    raise ConfigError(f"{name!r} is no environment{where}. {_near(bare, names)}{HOW_TO_LIST}")


def listing() -> list[Row]:
    """The paper's environments, and whether their libraries are there (looked for, not imported)."""
    rows = []
    for library, known in LIBRARIES.items():
        there = importlib.util.find_spec(library) is not None
        status = "installed" if there else install_line(known.extra)
        rows += [Row(_canonical(library, id), library, status) for id in _paper_ids(library)]
    return sorted(rows, key=lambda row: PAPER.index(row.name))


def _find(name: str, library: str, wanted: str) -> str:
    """The one id of a library that ``wanted`` means."""
    paper = _matches(wanted, _paper_ids(library), library)
    if len(paper) == 1:
        return paper[0]
    require(library, extra=LIBRARIES[library].extra)
    ids: list[str] = importlib.import_module(f"eggroll.rl.envs.{library}_env").ids()
    found = _matches(wanted, ids, library)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{name!r} fits several environments of {library}: {', '.join(found)}; give the whole id")
    near = _near(wanted, {_shortest(id, library): _canonical(library, id) for id in ids})
    raise ConfigError(f"{name!r} is no environment of {library}. {near}{HOW_TO_LIST}")


def _matches(wanted: str, ids: Iterable[str], library: str) -> list[str]:
    """The one id that ``wanted`` is, or else all of which it is a short form."""
    ids = list(ids)
    if wanted in ids:
        return [wanted]
    return [id for id in ids if _plain(wanted) in {_plain(form) for form in _forms(id, library)}]


def _forms(id: str, library: str) -> list[str]:
    """The id with none, one, several and all of its droppable parts left out; all of them is the last."""
    forms = [id]
    for part in LIBRARIES[library].droppable:
        forms += [re.sub(part, "", form) for form in forms]
    return forms


def _shortest(id: str, library: str) -> str:
    return _plain(_forms(id, library)[-1])


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _near(wanted: str, names: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(_plain(re.sub(VERSION, "", wanted)), names, n=3, cutoff=0.6)
    near = dict.fromkeys(names[form] for form in close)
    return f"Did you mean {' or '.join(near)}? " if near else ""


def _canonical(library: str, id: str) -> str:
    return id if library == "gymnax" and GYMNAX_OWN.fullmatch(id) else f"{library}/{id}"


def _paper_ids(library: str) -> list[str]:
    if library == "gymnax":
        return [name for name in PAPER if "/" not in name]
    return [name.removeprefix(f"{library}/") for name in PAPER if name.startswith(f"{library}/")]


def _gymnasium_ids() -> list[str]:
    if importlib.util.find_spec("gymnasium") is None:
        return []
    return list(require("gymnasium", extra="rl").registry)


def _options(name: str, library: str, given: Mapping[str, str]) -> dict[str, str]:
    """The options of the name and the keywords (which win), checked."""
    query = [item.partition("=") for item in name.partition("?")[2].split("&") if item]
    chosen = {key: value for key, _, value in query} | dict(given)
    known = LIBRARIES[library].options
    problems = []
    for key, value in chosen.items():
        if key not in known:
            allowed = f"allowed: {', '.join(known)}" if known else "it has none"
            problems.append(f"{key!r} is no option of {library}; {allowed}")
        elif value not in known[key]:
            problems.append(f"{key}={value!r} is not possible; allowed: {', '.join(known[key])}")
    if problems:
        raise ConfigError.from_problems(name, problems)
    return chosen
