"""The cases of scripts/zoo.py, and how they are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .case import Case


def all_cases(families: Sequence[str], say: Callable[[str], None]) -> dict[str, Case]:
    """The cases of some collections by their names; ``say`` is told what is left out because it is not installed."""
    from . import made_modules, timm_models, torch_modules, transformers_models

    makers = {"made": made_modules, "torch": torch_modules, "transformers": transformers_models, "timm": timm_models}
    unknown = sorted(set(families) - set(makers))
    if unknown:
        raise SystemExit(f"--family {' '.join(unknown)}: there are {', '.join(makers)}")
    found: dict[str, Case] = {}
    for family in families:
        cases = {case.name: case for case in makers[family].cases()}
        if not cases:
            say(f"{family} is left out: it is not installed here (pip install {family})")
        found.update(cases)
    return found
