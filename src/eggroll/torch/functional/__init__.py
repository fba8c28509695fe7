"""EGGROLL as functions of dictionaries: parameters in, perturbations, outputs, gradients and parameters out.

Ten lines train anything whose forward you can write as a composition of :func:`perturbed_forward` and
:func:`perturbed_conv2d`, or any module at all through :func:`make_perturbed_forward_fn`::

    shapes = get_weight_shapes(params)                                       # {"layer1.weight": (256, 784), ...}
    perts = generate_perturbations(shapes, 2048, 4, sigma, NoiseKey(seed, generation))
    logits = forward(x.expand(2048, -1, -1), params, perts)                  # (2048, batch, 10)
    fitness = normalize_fitnesses(-loss(logits, labels))                     # (2048,)
    update_params(params, compute_gradients(fitness, perts, 2048), lr)

The functions hold no state and run on any device, also inside ``torch.compile`` without graph breaks (drawing from a
``torch.Generator`` is the exception: it changes the generator, so draw by address there).

Shapes: P members (``pop``), r rank, n in, m out. Perturbations are ``{key: {"U": (P, r, m), "V": (P, r, n)}}``, and
member ``p`` has the weight ``W + U[p]^T V[p]``: sigma, ``1/sqrt(r)`` and the sign are in ``U``.
"""

from eggroll.torch.functional.config import EggrollConfig
from eggroll.torch.functional.forward import perturbed_conv2d, perturbed_forward
from eggroll.torch.functional.module import PerturbedForward, get_params_dict, make_perturbed_forward_fn
from eggroll.torch.functional.perturbations import (
    NoiseKey,
    Perturbations,
    generate_perturbations,
    get_weight_shapes,
    split_perturbations,
)
from eggroll.torch.functional.update import compute_gradients, eggroll_step, normalize_fitnesses, update_params

__all__ = [
    "EggrollConfig",
    "NoiseKey",
    "Perturbations",
    "PerturbedForward",
    "compute_gradients",
    "eggroll_step",
    "generate_perturbations",
    "get_params_dict",
    "get_weight_shapes",
    "make_perturbed_forward_fn",
    "normalize_fitnesses",
    "perturbed_conv2d",
    "perturbed_forward",
    "split_perturbations",
    "update_params",
]
