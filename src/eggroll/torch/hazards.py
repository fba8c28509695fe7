"""Models that draw noise of their own or mix the members of a population, found before they are run."""

from __future__ import annotations

from torch import nn

from eggroll.errors import UnsupportedOperationError

_RATES = (
    "drop_prob", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "dropout_p", "dropout_prob",
    "resid_dropout", "embd_dropout", "layerdrop", "drop_path",
)  # fmt: skip


def refuse_hazards(model: nn.Module, members: int) -> None:
    """Refuse a model that draws noise of its own, or mixes ``members`` of it.

    Raises:
        UnsupportedOperationError: dropout or batch statistics in training mode.
    """
    hazards = _training_hazards(model)
    if hazards:
        raise UnsupportedOperationError(
            f"the model is in training mode with {', '.join(hazards[:3])}"
            f"{' and others' if len(hazards) > 3 else ''}: members would differ by more than their perturbation. "
            "Call model.eval() first"
        )
    mixing = _batch_statistics(model) if members > 1 else []
    if mixing:
        raise UnsupportedOperationError(
            f"{', '.join(mixing[:3])}{' and others' if len(mixing) > 3 else ''} keeps no running statistics and "
            'normalizes over all members together. Evaluate one member at a time (mode="loop")'
        )


def _training_hazards(model: nn.Module) -> list[str]:
    """Names of modules in training mode that would mix members, change buffers or draw noise of their own."""
    hazards = []
    for name, module in model.named_modules():
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            mixing = module.track_running_stats
        rates = [getattr(module, rate, None) for rate in _RATES]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        random = any(isinstance(rate, float) and rate > 0.0 for rate in rates) or isinstance(module, nn.RReLU)
        if module.training and (random or mixing):
            hazards.append(f"{name} ({type(module).__name__})")
    return hazards


def _batch_statistics(model: nn.Module) -> list[str]:
    """Names of modules that normalize over the batch in every mode, and so over all members together."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
