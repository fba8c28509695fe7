"""A case against the oracle: every member's plain weights in the plain module, one by one, is what must come out.

A result is one of ``right``, ``refused`` (an error of eggroll's own, with its sentence), ``wrong`` and ``crashed`` (any
other exception). Deviations are relative to what the perturbation does: the largest difference from the expected
output over the largest difference of the expected output from the center's. A member that is taken for another one, or
for the center, is off by about 1. Where rounding is amplified (a deviation above ``TOLERANCE`` in float32), the same
mode is run once more in float64, and that deviation counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from eggroll.core.oracle import perturbation
from eggroll.errors import EggrollError
from eggroll.torch import Population
from eggroll.torch.perturbed import Value

from .case import Built, Case, Inputs, NoCaseError, cast, fresh

Result = dict[str, Any]
TOLERANCE = 1e-3
SIGMA = 0.02
FIRST = {"population_size": 4, "sigma": SIGMA, "rank": 1, "seed": 7}
SECOND = {"population_size": 3, "sigma": SIGMA, "rank": 2, "seed": 8, "antithetic": False}
GENERATION = 3
NEW_TOKENS = 5
LAST_WORD = ("none", "right", "refused", "crashed", "wrong")  # by how much they matter


class _WrongError(Exception):
    """Outputs that are not those of the members."""


@torch.no_grad()
def run_case(case: Case) -> Result:
    """All that the table says about a case."""
    start = time.perf_counter()
    result: Result = {"case": case.name, "what": case.what}
    try:
        built = case.build()
        result["parameters"] = sum(p.numel() for p in built.model.parameters())
        expected = Expected(built, FIRST, built.rows[0])
    except NoCaseError as error:
        return {**result, "status": "no case", "sentence": sentence(error)}
    result.update(automatic(built, expected))
    if result.get("effect") == 0.0:
        return {**result, "status": "no case", "sentence": "the perturbation changes none of its outputs"}
    result["block"] = in_block(built)
    if built.generates:
        result["generation"] = generation(built)
    parts = [result, result["block"], result.get("generation", {}), result.get("generation", {}).get("rows", {})]
    worst = max((part["status"] for part in parts if part), key=LAST_WORD.index)
    # A refusal of one way to use a model is no refusal of the model.
    result["overall"] = result["status"] if worst == "refused" else worst
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


class Expected:
    """The outputs of plain modules with each member's plain weights, and of the center, for one batching."""

    def __init__(
        self, built: Built, settings: Mapping[str, Any], rows: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.built, self.settings, self.dtype = built, settings, dtype
        self.model = fresh(built.model).to(dtype)
        self.population = range(settings["population_size"])
        self.own = [cast(built.inputs(p, rows), dtype) for p in self.population]
        self.joint = built.joint(self.own)
        self.centers = [self._plain(inputs) for inputs in self.own]
        self.joint_center = self._plain(self.joint)
        if not all(map(_same, self.centers[0], self._plain(self.own[0]))):
            raise NoCaseError("the plain module draws random numbers")
        many = sum(len(one) for one in self.centers)
        self.by_row = len(self.joint_center) == many > len(self.centers[0])
        """Whether the outputs are a list with something for each row, so that members' lists follow one another."""
        for one in self.centers:
            if not one or (len(one) != len(self.joint_center) and not self.by_row):
                raise NoCaseError("the plain module's outputs are no tensors, or other ones for other batches")
        if not any(t.is_floating_point() and bool(t.isfinite().any()) for t in self.centers[0]):
            raise NoCaseError("the plain module's outputs are not finite")
        self.members: list[list[Tensor]] = []

    def _plain(self, inputs: Inputs) -> list[Tensor]:
        try:
            return run(fresh(self.model), inputs)
        except EggrollError:
            raise
        except Exception as error:
            raise NoCaseError(f"the plain module does not run: {sentence(error)}") from error

    def evaluate(self, population: Population) -> None:
        """Each member by itself: a copy of the plain module, whose parameters are set to the oracle's numbers."""
        for member in self.population:
            self.members.append(run(self.alone(population, member), self.own[member]))

    def alone(self, population: Population, member: int) -> nn.Module:
        """A plain module with one member's weights."""
        model = fresh(self.model)
        parameters = dict(model.named_parameters())
        for spec in population.specs:
            noise = perturbation(
                spec,
                member,
                rank=self.settings["rank"],
                seed=self.settings["seed"],
                generation=GENERATION,
                antithetic=self.settings.get("antithetic", True),
            )
            center = parameters[spec.name]
            # Copied, not assigned: whatever else holds the parameter sees it.
            center.copy_((center.double() + SIGMA * torch.as_tensor(np.asarray(noise))).to(center.dtype))
        return model

    def batch_dim_of(self, slot: int) -> int | None:
        """The dimension of an output that grows with the batch; ``None`` if none does, the first if several do.

        What does not grow belongs to no row, and comes once for each member, ``(members, *shape)``.
        """
        if self.by_row:
            return None
        one, all_of_them = self.centers[0][slot].shape, self.joint_center[slot].shape
        if len(one) != len(all_of_them):
            return None
        return next((d for d, (a, b) in enumerate(zip(one, all_of_them, strict=True)) if a != b), None)

    def joined(self, outputs: Sequence[Tensor], slot: int) -> Tensor:
        """An output of all members as the population returns it."""
        dim = self.batch_dim_of(slot)
        return torch.stack(list(outputs)) if dim is None else torch.cat(list(outputs), dim)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """A module's outputs: all tensors, caches aside."""
    return tensors(model(*inputs[0], **inputs[1]))


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors among a model's outputs, caches aside."""
    if isinstance(outputs, Mapping):
        outputs = {key: x for key, x in outputs.items() if "past_key" not in key and "cache" not in key}
    return [x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor)]


def effect(member: Tensor, center: Tensor) -> float:
    """What the perturbation does to an output, relative to its largest entry; 1 for changed integers."""
    if not member.is_floating_point():
        return float(not torch.equal(member, center))
    difference = (member.double() - center.double()).abs()
    largest, scale = (
        float(x[x.isfinite()].max()) if bool(x.isfinite().any()) else 0.0 for x in (difference, member.abs())
    )
    return float(f"{largest / max(scale, 1e-30):.2g}")


def deviation(got: Tensor, expected: Tensor, center: Tensor) -> float:
    """How far an output is off, relative to the perturbation's effect on it; 0 within rounding."""
    if type(got) not in (Tensor, nn.Parameter):
        raise _WrongError(f"an output is a {type(got).__name__} and not a plain tensor")
    if got.shape != expected.shape:
        raise _WrongError(f"an output has the shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    if got.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        if expected.is_complex():
            return deviation(torch.view_as_real(got), torch.view_as_real(expected), torch.view_as_real(center))
        return float((got != expected).double().mean())
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = (got.double() - expected.double()).abs().masked_fill(same, 0.0).nan_to_num(float("inf")).max()
    effect = (expected.double() - center.double()).abs()
    size = expected.double().abs()
    largest_effect, scale = (float(x[x.isfinite()].max()) if bool(x.isfinite().any()) else 0.0 for x in (effect, size))
    rounding = torch.finfo(expected.dtype).eps * scale
    if largest_effect <= 200 * rounding and float(error) <= 20 * rounding:
        return 0.0  # the perturbation does nothing to it
    return float(error) / max(largest_effect, rounding, 1e-30)


def attempt(action: Callable[[], Result]) -> Result:
    """What an action ends in."""
    try:
        found = action()
    except NoCaseError as error:
        return {"status": "none", "sentence": sentence(error)}
    except _WrongError as error:
        return {"status": "wrong", "sentence": str(error)}
    except EggrollError as error:
        return {"status": "refused", "sentence": sentence(error)}
    except Exception as error:
        return {"status": "crashed", "sentence": f"{type(error).__name__}: {sentence(error)}"}
    close = found["deviation"] <= TOLERANCE
    if not close:
        found.setdefault("sentence", f"members are off by {found['deviation']:.2g} of what their perturbation does")
    return {"status": "right" if close else "wrong", **found}


def sentence(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def automatic(built: Built, expected: Expected) -> Result:
    """``Population.forward`` with ``mode="auto"``."""
    result = attempt(lambda: _forward(built, expected, "auto"))
    if result["status"] == "wrong" and "deviation" in result:
        precise = attempt(lambda: _forward(built, Expected(built, FIRST, built.rows[0], torch.float64), result["mode"]))
        if precise["status"] == "right":
            result = {**result, **precise, "slowdown": result["slowdown"], "float64": True}
            del result["sentence"]
    return result


def _forward(built: Built, expected: Expected, mode: str) -> Result:
    model = fresh(expected.model)
    population = Population(model, mode=mode, batch_dim=built.batch_dim, **expected.settings)  # type: ignore[arg-type]
    expected.evaluate(population)
    args, kwargs = expected.joint
    got = tensors(population.forward(*args, generation=GENERATION, **kwargs))
    found: Result = {"mode": population.mode, "deviation": 0.0}
    found["effect"] = max(effect(a, b) for a, b in zip(expected.members[0], expected.centers[0], strict=True))
    # A list with something for each row comes back as all rows' outputs, or as one member's many, joined one by one.
    by_row = expected.by_row and len(got) == len(expected.joint_center)
    if len(got) != len(expected.centers[0]) and not by_row:
        raise _WrongError(f"{len(got)} outputs instead of {len(expected.joint_center)}")
    for slot, mine in enumerate(got):
        if by_row:
            theirs, center = (
                [x for out in outputs for x in out][slot] for outputs in (expected.members, expected.centers)
            )
            found["deviation"] = max(found["deviation"], deviation(mine, theirs, center))
            continue
        theirs, center = (
            expected.joined([out[slot] for out in outputs], slot) for outputs in (expected.members, expected.centers)
        )
        if mine.shape != theirs.shape and mine.shape == expected.centers[0][slot].shape and _all_equal(expected, slot):
            continue  # the same for all members, and returned once
        found["deviation"] = max(found["deviation"], deviation(mine, theirs, center))
    unchanged(expected, model)
    found["slowdown"] = slowdown(
        lambda: population.forward(*args, generation=GENERATION, **kwargs), lambda: model(*args, **kwargs)
    )
    return found


def _all_equal(expected: Expected, slot: int) -> bool:
    first = expected.members[0][slot]
    return all(torch.equal(first, outputs[slot]) for outputs in expected.members)


def unchanged(expected: Expected, model: nn.Module) -> None:
    """After the population the model must be what it was: its state, and what it computes."""
    before = expected.model.state_dict()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not torch.equal(value.nan_to_num(), before[name].nan_to_num()):
            raise _WrongError(f"{name} of the model itself is another one afterwards")
    try:
        outputs = zip(run(model, expected.own[0]), expected.centers[0], expected.members[0], strict=True)
        largest = max(deviation(*three) for three in outputs)
    except Exception as error:
        raise _WrongError(f"the model itself does not run afterwards: {sentence(error)}") from error
    if largest > TOLERANCE:
        raise _WrongError("the model itself computes something else afterwards")


def in_block(built: Built) -> Result:
    """``Population.perturbed`` around a plain call: another batching, other settings, nothing checked afterwards."""
    result = attempt(lambda: _block(built, torch.float32))
    if result["status"] == "wrong" and "deviation" in result:
        precise = attempt(lambda: _block(built, torch.float64))
        if precise["status"] == "right":
            result = {**precise, "float64": True}
    return result


def _block(built: Built, dtype: torch.dtype) -> Result:
    expected = Expected(built, SECOND, built.rows[1], dtype)
    model = fresh(expected.model)
    population = Population(model, batch_dim=built.batch_dim, **expected.settings)
    expected.evaluate(population)
    found: Result = {"deviation": 0.0}
    args, kwargs = expected.joint
    refusal: EggrollError | None = None
    with population.perturbed(GENERATION) as active:
        got = tensors(model(*args, **kwargs))
        if expected.by_row:
            if len(got) != len(expected.joint_center):
                raise _WrongError(f"{len(got)} outputs instead of {len(expected.joint_center)}")
            # A row that the model takes out of the batch has a value for every member, of which its own counts.
            each = len(got) // len(expected.population)
            got = [x.by_member().data_P[i // each] if isinstance(x, Value) else x for i, x in enumerate(got)]
            pairs = zip(
                got, *([x for out in o for x in out] for o in (expected.members, expected.centers)), strict=True
            )
            found["deviation"] = max(deviation(*three) for three in pairs)
            got = []
        for slot, mine in enumerate(got):
            if expected.batch_dim_of(slot) is None and mine.ndim > 0 and _all_equal(expected, slot):
                continue
            try:
                parts = active.split(mine)
            except EggrollError as error:
                refusal = error
                continue
            for p in expected.population:
                theirs, center = expected.members[p][slot], expected.centers[p][slot]
                found["deviation"] = max(found["deviation"], deviation(parts[p], theirs, center))
    if refusal is not None and found["deviation"] <= TOLERANCE:
        raise refusal
    unchanged(expected, model)
    return found


def generation(built: Built) -> Result:
    """Greedy generation with left padding: in rows, or one member at a time where that is refused."""
    expected = Expected(built, FIRST, 2)
    model = fresh(expected.model)
    population = Population(model, **expected.settings)
    own = [_prompts(inputs) for inputs in expected.own]
    try:
        centers = [_generate(fresh(model), inputs) for inputs in own]
    except Exception as error:
        return {"status": "none", "sentence": f"the plain model does not generate: {sentence(error)}"}
    members = [_generate(expected.alone(population, p), inputs) for p, inputs in enumerate(own)]
    moved = float(torch.stack([(a[0] != b[0]).double().mean() for a, b in zip(members, centers, strict=True)]).mean())

    def compared(outputs: Sequence[tuple[Tensor, Tensor]], mode: str) -> Result:
        found: Result = {"deviation": 0.0, "mode": mode, "tokens moved": round(moved, 3)}
        for (ids, logits), theirs, center in zip(outputs, members, centers, strict=True):
            found["deviation"] = max(
                found["deviation"], deviation(ids, theirs[0], center[0]), deviation(logits, theirs[1], center[1])
            )
        return found

    def rows() -> Result:
        joint = {key: torch.cat([inputs[key] for inputs in own]) for key in own[0]}
        with population.perturbed(GENERATION) as active:
            ids, logits = _generate(model, joint)
            return compared(list(zip(active.split(ids), active.split(logits), strict=True)), "rows")

    def one_by_one() -> Result:
        outputs = []
        for p, inputs in enumerate(own):
            with population.member(GENERATION, p) as alone:
                outputs.append(_generate(alone, inputs))
        return compared(outputs, "loop")

    result = attempt(rows)
    if result["status"] in ("refused", "crashed"):
        instead = attempt(one_by_one)
        if instead["status"] != "right":
            return instead
        return {**instead, "rows": result}
    return result


def _prompts(inputs: Inputs) -> dict[str, Tensor]:
    """Two prompts, the first of them shorter by two tokens and padded on the left."""
    ids = inputs[1]["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _generate(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens ``(rows, length)``, and the logits of every step ``(rows, steps, vocabulary)``."""
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(list(out.logits), 1)


def slowdown(population: Callable[[], Any], plain: Callable[[], Any]) -> float:
    """Best of a few times of the population over best of a few times of the plain module with the same rows."""
    best = {population: float("inf"), plain: float("inf")}
    plain()
    spent = time.perf_counter()
    for _ in range(3):
        for action in (population, plain):
            start = time.perf_counter()
            action()
            best[action] = min(best[action], time.perf_counter() - start)
        if time.perf_counter() - spent > 1.0:
            break
    return round(best[population] / best[plain], 2)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and without the libraries' progress lines."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
