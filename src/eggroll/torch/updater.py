"""From the estimate to new weights: any ``torch.optim`` optimizer, float32 masters, stochastic rounding.

A step in 16 bit would be lost: at |w| = 0.02 half the distance between two bfloat16 values is 6e-5, and typical steps
are smaller. So 16-bit parameters have float32 masters, or are rounded up or down at random with the right mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.core.address import parameter_key
from eggroll.core.config import ESConfig, OptimizerName, Rounding
from eggroll.core.threefry import fold_in
from eggroll.core.turning import Turning, stride_of
from eggroll.errors import CheckpointError, ConfigError
from eggroll.torch.anchor import Anchor
from eggroll.torch.kernels import adam_c, step_c
from eggroll.torch.quantized.scales import ScalesUpdater
from eggroll.torch.quantized.tensor import grid_of
from eggroll.torch.quantized.threshold import ThresholdUpdater
from eggroll.torch.quantized.update import GridRule, GridUpdater, Steps, delta_of
from eggroll.torch.threefry import random_bits

ROUNDING_STREAM = 0xE66
"""Keeps the bits of stochastic rounding apart from those of the perturbations."""
RESIDUAL_STREAM = 0x9E51D
"""Likewise those of what the residual of a quantized weight begins with."""

IN_C = ("sgd", "adam", "adamw")
"""Optimizers whose steps are also written in C."""

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def optimizer_factory(config: ESConfig) -> OptimizerFactory:
    """The ``torch.optim`` optimizer that a configuration names, set to ascend."""
    decay, lr = config.weight_decay, config.lr
    if config.optimizer == "sgd":
        return lambda params: torch.optim.SGD(params, lr=lr, weight_decay=decay, maximize=True)
    if config.optimizer == "momentum":
        momentum = config.momentum
        return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=decay, maximize=True)
    rule = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    betas = config.betas
    return lambda params: rule(params, lr=lr, betas=betas, weight_decay=decay, maximize=True)


class Updater:
    """Applies estimates to parameters, one parameter at a time, so that only one gradient exists at once.

    Args:
        parameters: name to parameter, all that are evolved.
        factory: makes an optimizer (set to maximize) for a list of tensors; each parameter gets its own.
        rounding: how steps reach 16-bit parameters (see :class:`eggroll.core.config.ESConfig`).
        seed: of stochastic rounding, and of what the residuals of quantized parameters begin with.
        grid_rule: how steps move the codes of quantized parameters.
        weight_decay: whether a step depends on the weights themselves.
        past: gives the steps of earlier generations of a parameter, if residuals are rebuilt from them.
        anchor: the pull towards the start weights, if there is one.
        plain: the name of the optimizer, if it is ours and weights do not decay: some have steps in C then, with the
            same bits.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        factory: OptimizerFactory,
        *,
        rounding: Rounding,
        seed: int,
        grid_rule: GridRule | None = None,
        weight_decay: bool = False,
        past: Callable[[str], Steps] | None = None,
        anchor: Anchor | None = None,
        plain: OptimizerName | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.seed = seed
        self.turning = Turning()
        self._anchor = anchor
        self._plain = plain if anchor is None and plain in IN_C else None
        self.rounding: Rounding = "master" if rounding == "auto" else rounding
        self.masters: dict[str, Tensor] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._targets: dict[str, Tensor] = {}
        # With stochastic rounding a parameter's float32 form lives for one step only, its optimizer state for all.
        self._kept_states: dict[str, dict[str, Any]] = {}
        self._grids: dict[str, GridUpdater | ThresholdUpdater | ScalesUpdater] = {}
        self._weight_decay = weight_decay
        for name, parameter in self.parameters.items():
            grid = grid_of(parameter)
            if grid is not None:
                rule = grid_rule or GridRule()
                if rule.name == "threshold":
                    self._grids[name] = ThresholdUpdater(grid, rule)
                elif rule.name == "scales":
                    self._grids[name] = ScalesUpdater(grid)
                else:
                    key = fold_in(parameter_key(seed, name), RESIDUAL_STREAM)
                    self._grids[name] = GridUpdater(grid, rule, None if past is None else past(name), key)
                continue
            target = parameter.detach()
            if self.rounding == "stochastic" and parameter.dtype == torch.float16:
                raise ConfigError(
                    f'rounding="stochastic" is for bfloat16, and {name!r} is float16; use rounding="master"'
                )
            if self.rounding == "master" and _is_half(parameter):
                target = self.masters[name] = parameter.detach().float()
            self._targets[name] = target
            if not (self.rounding == "stochastic" and _is_half(parameter)):
                self._optimizers[name] = factory([target])
        self._factory = factory

    @torch.no_grad()
    def step(self, name: str, gradient: Tensor, *, lr: float, generation: int) -> float:
        """One optimizer step of one parameter. ``gradient`` is float32. Returns the squared norm of the change."""
        if name in self._grids:
            return self._step_on_grid(name, gradient, lr=lr, generation=generation)
        parameter, target = self.parameters[name], self._targets[name]
        self._follow(name, parameter, target)
        if name not in self._optimizers:
            return self._step_stochastic(name, gradient, lr=lr, generation=generation)
        if self._plain is not None:
            squares = self._step_plain(name, gradient, lr)
            if squares is not None:
                return squares
        before = target.clone()
        gradient, pull = self._pulled(name, gradient, target, lr)
        self._step(self._optimizers[name], target, gradient.to(target.dtype), lr)
        if pull is not None:
            target.sub_(pull)
        if name in self.masters:
            parameter.copy_(target)
        return self._measured(name, before.sub_(target).float())

    def _step_plain(self, name: str, gradient: Tensor, lr: float) -> float | None:
        """The step in few passes, with the same bits; ``None`` where that is not to be had."""
        target, weights = self._targets[name], self.parameters[name].detach() if name in self.masters else None
        stride = stride_of(target.shape)
        before = target.reshape(-1)[::stride].clone()
        if self._plain == "sgd":
            squares = step_c.step_(target, gradient, weights, lr)
        else:
            squares = self._step_adam(name, gradient, weights, lr)
        if squares is not None:
            self.turning.add(name, before.sub_(target.reshape(-1)[::stride]).numpy(), stride)
        return squares

    def _step_adam(self, name: str, gradient: Tensor, weights: Tensor | None, lr: float) -> float | None:
        """Adam's, beginning with its second step: the first one is PyTorch's, which makes the state."""
        optimizer, target = self._optimizers[name], self._targets[name]
        state = optimizer.state.get(target)
        if not state:
            return None
        (group,) = optimizer.param_groups
        return adam_c.step_(target, gradient, weights, state, rate=lr, betas=group["betas"], eps=group["eps"])

    def _pulled(self, name: str, gradient: Tensor, target: Tensor, lr: float) -> tuple[Tensor, Tensor | None]:
        """The gradient with the pull towards the start in it, or the pull that is to be subtracted after the step."""
        if self._anchor is None:
            return gradient, None
        pull = self._anchor.pull(name, target)
        return (gradient, pull.mul_(lr)) if self._anchor.decoupled else (gradient - pull, None)

    def _follow(self, name: str, parameter: nn.Parameter, target: Tensor) -> None:
        """Notice what was done to a parameter from outside: other numbers are taken over, other memory is refused."""
        if name in self.masters:
            same = step_c.is_rounded(target, parameter.detach())
            if same is None:
                same = torch.equal(target.to(parameter.dtype), parameter)
            if not same:
                target.copy_(parameter)
        elif target.data_ptr() != parameter.data_ptr() or target.dtype != parameter.dtype:
            raise ConfigError(
                f"the memory of parameter {name!r} was replaced since the optimizer was made (model.to(...), .double() "
                "or vector_to_parameters): move or convert the model first, then make the optimizer"
            )

    def _step(self, optimizer: torch.optim.Optimizer, target: Tensor, gradient: Tensor, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        target.grad = gradient
        optimizer.step()
        target.grad = None

    def _step_on_grid(self, name: str, gradient: Tensor, *, lr: float, generation: int) -> float:
        updater = self._grids[name]
        if isinstance(updater, ThresholdUpdater):
            return updater.step(gradient, generation) if lr else 0.0
        if isinstance(updater, ScalesUpdater):
            relative = torch.zeros_like(gradient)
            self._step_passing(name, relative, gradient=gradient, lr=lr)
            return updater.step(relative)
        change = functools.partial(self._step_passing, name, gradient=gradient, lr=lr)
        return updater.step(delta_of(change, updater.grid, needs_weights=self._weight_decay), generation)

    def _step_passing(self, name: str, wide: Tensor, *, gradient: Tensor, lr: float) -> None:
        """One step of the optimizer on a tensor that lives for this step only, unlike the optimizer's state."""
        optimizer = self._factory([wide])
        if name in self._kept_states:
            optimizer.state[wide] = self._kept_states[name]
        self._step(optimizer, wide, gradient, lr)
        self._kept_states[name] = optimizer.state[wide]

    def _step_stochastic(self, name: str, gradient: Tensor, *, lr: float, generation: int) -> float:
        parameter = self.parameters[name]
        wide = parameter.detach().float()
        before = wide.clone()
        gradient, pull = self._pulled(name, gradient, wide, lr)
        self._step_passing(name, wide, gradient=gradient, lr=lr)
        if pull is not None:
            wide.sub_(pull)
        key = fold_in(fold_in(parameter_key(self.seed, name), ROUNDING_STREAM), generation)
        bits = random_bits(torch.tensor([key], dtype=torch.int64), wide.numel(), device=wide.device)
        parameter.copy_(round_stochastically(wide, bits.view(wide.shape)))
        return self._measured(name, before.sub_(wide))

    def _measured(self, name: str, change: Tensor) -> float:
        """The squared norm of a change, which is used up; its sample goes to ``turning``."""
        stride = stride_of(change.shape)
        self.turning.add(name, change.reshape(-1)[::stride].cpu().numpy(), stride)
        return float(change.square_().sum())

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything besides the parameters that the next step depends on, flat, for a checkpoint."""
        tensors = {f"master/{name}": master for name, master in self.masters.items()}
        for name, updater in self._grids.items():
            tensors |= {f"grid/{name}/{key}": value for key, value in updater.state().items()}
        if self._anchor is not None:
            tensors |= {f"anchor/{name}": digest for name, digest in self._anchor.state().items()}
        for name, state in self._states().items():
            for key, value in state.items():
                tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` gave.

        Raises:
            CheckpointError: masters are missing (the checkpoint was written with another ``rounding``), or the run
                began with other weights (with ``anchor``).
        """
        missing = [name for name in self.masters if f"master/{name}" not in tensors]
        if missing:
            raise CheckpointError(
                f"the checkpoint has no float32 master for {len(missing)} parameters ({missing[0]}, ...): it was "
                "written with another setting of rounding or dtype; use the same as then"
            )
        if self._anchor is not None:
            start = "anchor/"
            self._anchor.check({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        self.turning.forget()
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
        for name, updater in self._grids.items():
            prefix = f"grid/{name}/"
            updater.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for optimizer in self._optimizers.values():
            optimizer.state.clear()  # a state that was saved before the first step has no entries of its own
        self._kept_states.clear()
        states: dict[str, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                name, _, entry = key.removeprefix("optimizer/").rpartition("/")
                states.setdefault(name, {})[entry] = value
        unknown = sorted(set(states) - set(self.parameters))
        if unknown:
            raise CheckpointError(
                f"the checkpoint holds optimizer states of parameters that are not here: {unknown[:3]}"
            )
        for name, state in states.items():
            device = self.parameters[name].device
            # Adam keeps its step counter on the CPU whatever the parameter's device.
            moved = {k: v.clone() if v.ndim == 0 else v.to(device).clone() for k, v in state.items()}
            if name in self._optimizers:
                self._optimizers[name].state[self._targets[name]] = moved
            else:
                self._kept_states[name] = moved

    def _states(self) -> dict[str, dict[str, Any]]:
        states = {
            name: dict(optimizer.state.get(self._targets[name], {})) for name, optimizer in self._optimizers.items()
        }
        states.update(self._kept_states)
        return {
            name: {key: value for key, value in state.items() if value is not None} for name, state in states.items()
        }


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def round_stochastically(wide: Tensor, bits: Tensor) -> Tensor:
    """Float32 to bfloat16, up or down at random so that the mean is right.

    Args:
        wide: float32 values.
        bits: int32 random bits of the same shape; the lower 16 of each are used.
    """
    # bfloat16 is the upper half of a float32: add 16 random bits to the lower half and cut it off.
    raw = wide.view(torch.int32).to(torch.int64) + (bits.to(torch.int64) & 0xFFFF)
    cut = (raw & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(wide), cut, wide).to(torch.bfloat16)
