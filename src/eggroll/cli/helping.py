"""``--help``: the options that matter first, then the others by topic; ``--help-all`` shows every one with its text."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from eggroll.core.settings import about, flag_of

HELP = ("-h", "--help")
ALL = "--help-all"
WORDS = frozenset((*HELP, ALL))
FIRST = {
    "tune": ("reward", "dataset", "task", "minutes", "output"),
    "eval": ("task", "problems", "samples", "max_tokens", "output"),
    "info": ("population_size", "rank", "prompts_per_generation", "max_tokens", "dtype"),
    "chat": ("question", "only", "system", "max_tokens", "temperature"),
    "generate": ("output", "only", "batch_size", "max_tokens", "temperature"),
    "rl": ("env", "generations", "population_size", "output", "list"),
    "pretrain": ("data", "minutes", "population_size", "output", "sample"),
    "recipe": ("generations", "population_size", "seed", "output", "resume"),
}
"""The five options of a command that matter first; a command with few options needs none named."""
GROUPS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "What is trained or asked, and on what",
        ("reward", "task", "dataset", "eval_prompts", "data", "env", "list", "preset", "render", "question", "only",
         "prompts", "problems", "samples", "sample", "to", "sort", "filter", "watch"),
        ("shots", "text_column", "prompt_tokens", "model", "backprop", "allow_difference", "reverse"),
    ),
    (
        "How long, and which weights are kept",
        ("generations", "minutes", "env_steps", "seconds", "turns", "keep", "patience"),
        (),
    ),
    (
        "Population and step",
        ("population_size", "population", "prompts_per_generation", "batch", "rank", "sigma",
         "sigma_shift", "lr", "alpha", "optimizer"),
        ("sampling", "fitness_shaping", "rank_transform", "fitness", "group_size", "elite_k", "samples_per_prompt",
         "pass_at", "weight_decay", "anchored_weight_decay", "momentum", "betas", "lr_schedule", "lr_decay",
         "sigma_schedule", "sigma_decay", "noise_reuse", "noiser", "algo", "alpha_schedule", "alpha_decay",
         "alpha_final", "sign_of_noise", "momentum_shift", "noise", "noise_table_size"),
    ),
    (
        "Which parameters are evolved",
        ("target_modules", "embeddings"),
        ("exclude", "head", "vectors"),
    ),
    (
        "Network and episodes",
        ("n_layers", "hidden", "layers", "width", "episodes", "max_steps", "tokens", "context"),
        ("precision", "deterministic", "normalize_obs", "memory_gib"),
    ),
    (
        "Answers",
        ("max_tokens", "temperature", "system"),
        ("max_length", "chat", "sample_every", "sample_length", "prompt"),
    ),
    (
        "A judge or a world gives the score",
        ("judge_url", "judge_model", "world"),
        ("judge_prompt", "judge_reference", "judge_scale", "judge_weight", "judge_requests", "judge_rate",
         "judge_timeout", "judge_failures", "max_turns", "world_timeout", "world_failure_score", "world_workers"),
    ),
    (
        "Loading and computing",
        ("device", "dtype", "quantize", "batch_size", "members_per_forward", "seed"),
        ("revision", "attn_implementation", "trust_remote_code", "rounding", "quantized_update", "residual_decay",
         "residual_start", "residual_generations", "move_threshold", "backend", "engine_args", "threads", "devices"),
    ),
    (
        "What the run writes",
        ("output", "resume", "config", "eval_every", "checkpoint_every", "report_to"),
        ("accept_changes", "samples_per_generation", "eval_episodes", "eval_tokens", "push_to_hub", "hub_model_id",
         "hub_private"),
    ),
    ("Many processes or machines", ("workers",), ("ray_address", "worker_cpus", "worker_gpus")),
)  # fmt: skip
"""Heading; options of one line each; options that ``--help`` only names."""
NARROW, LEFT, WIDE = 60, 33, 110
"""Columns: the fewest that text is wrapped to, those of the names, and the most that are used."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as ``--help`` shows it."""

    name: str
    flags: tuple[str, ...]
    values: str
    text: str
    default: str
    positional: bool = False


def options(kind: Any, texts: Mapping[str, str], known: Mapping[str, Any], config: str | None) -> list[Option]:
    """The options of a command.

    Args:
        kind: their dataclass.
        texts: each field's text.
        known: defaults that are not those of the fields.
        config: the text of ``--config``; ``None`` for a command without it.
    """
    hints = get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        told, hint = about(kind, field.name), hints[field.name]
        if told.get("hidden"):
            continue
        default, text = known.get(field.name, _default(field)), texts.get(field.name, "")
        if told.get("positional"):
            found.append(Option(field.name, (told["positional"],), "", text, "", positional=True))
            continue
        names = [flag.replace("_", "-") for flag in told.get("flags", ())]
        long = [flag_of(field.name), *(name for name in names if name.startswith("--"))]
        if hint is bool:
            long.insert(1, f"--no-{long[0][2:]}")
        flags = tuple(dict.fromkeys((*(name for name in names if not name.startswith("--")), *long)))
        shown = "" if "(default:" in text else _shown(default)
        found.append(Option(field.name, flags, values_of(hint), text, shown))
    if config is not None:
        found.append(Option("config", ("--config",), "FILE", config, ""))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is None or value is False or value == () or value == "":
        return ""
    if type(value) not in (bool, int, float, str, tuple, list):  # a mark for a value that has to be given
        return "required"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "yes" if value is True else str(value)


def values_of(hint: Any) -> str:
    """What stands behind a flag: ``N``, ``NUMBER``, ``TEXT``, or the words that there are; nothing for a switch."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(values_of(part) for part in parts if part is not types.NoneType)) or "yes|no"
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        one = values_of(parts[0])
        return f"{one} ..." if Ellipsis in parts else " ".join(map(values_of, parts))
    return {int: "N", float: "NUMBER", bool: ""}.get(hint, "TEXT")


def lines(prog: str, description: str, found: Sequence[Option], *, everything: bool, width: int) -> list[str]:
    """The help of a command, a line each; a heading ends with a colon.

    Args:
        prog: the command as it is typed, such as ``eggroll tune``.
        description: what it does; its first paragraph counts, if not ``everything`` is asked for.
        found: its options.
        everything: show every option with its whole text.
        width: of the terminal, in characters.
    """
    width = max(NARROW, min(width, WIDE))
    places = [option for option in found if option.positional]
    command = prog.split()[1] if " " in prog else prog
    names = FIRST.get(command, ())
    first = [option for name in names for option in found if option.name == name]
    rest = [option for option in found if option not in first and option not in places]
    sections = _sections(rest, everything or not first)
    if first:
        sections = [("The options that matter first", first, []), *sections]
    elif len(sections) == 1 or len(rest) <= len(FIRST["tune"]):
        sections = [("Options", rest, [])]
    short = not everything and (len(rest) > len(FIRST["tune"]) or any(rare for _, _, rare in sections))
    usage = " ".join(("usage:", prog, *(option.flags[0] for option in places), "[OPTIONS]"))
    written = _wrapped(f"{usage}   ({ALL}: every option with its whole text)" if short else usage, width)
    told = inspect.cleandoc(description)
    for paragraph in told.split("\n\n")[:1] if short else told.split("\n\n"):
        written += ["", *_wrapped(" ".join(paragraph.split()), width)] if paragraph else []
    written += [""] if places else []
    for option in places:
        written += _entry(option, width, whole=True, everything=everything)
    for heading, common, rare in sections:
        written += ["", f"{heading}:"]
        for option in common:
            whole = everything or not short or option in first
            written += _entry(option, width, whole=whole, everything=everything)
        if rare:
            also = ", ".join(next(flag for flag in option.flags if flag.startswith("--")) for option in rare)
            written += textwrap.wrap(
                f"also {also}", width, initial_indent="  ", subsequent_indent="    ",
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
    return written


def _sections(rest: Sequence[Option], everything: bool) -> list[tuple[str, list[Option], list[Option]]]:
    by_name = {option.name: option for option in rest}
    found = []
    for heading, common, rare in GROUPS:
        here = [by_name.pop(name) for name in common if name in by_name]
        named = [by_name.pop(name) for name in rare if name in by_name]
        if everything or not here:
            here, named = here + named, []
        if here or named:
            found.append((heading, here, named))
    if by_name:
        found.append(("Others", list(by_name.values()), []))
    return found


def _entry(option: Option, width: int, *, whole: bool, everything: bool) -> list[str]:
    flags = option.flags
    if not everything and not option.positional:
        flags = (*(flag for flag in flags if len(flag) == 2), next(flag for flag in flags if len(flag) > 2))
    left = f"  {', '.join(flags)}"
    if option.values:
        left += f" {option.values}"
    text = option.text if whole else _beginning(option.text)
    default = f" [{option.default}]" if option.default else ""
    right = _wrapped(f"{text}{default}", width - LEFT - 2)
    if len(left) > LEFT:
        return [*_wrapped(left, width, "      "), *(f"{'':<{LEFT}}  {line}" for line in right)]
    begin = f"{left:<{LEFT}}  "
    return [f"{begin}{right[0] if right else ''}".rstrip(), *(f"{'':<{LEFT}}  {line}" for line in right[1:])]


def _beginning(text: str) -> str:
    """The first clause of a text; what is in brackets is not cut."""
    for end in re.finditer(r"\. |; |: |\.$", text):
        before = text[: end.start()]
        if before.count("(") == before.count(")"):
            return before
    return text


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
