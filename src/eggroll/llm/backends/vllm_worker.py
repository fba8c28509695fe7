"""What runs inside vLLM's workers: members as LoRA adapters drawn by address, and updates of the base weights in place.

vLLM adds :class:`EggrollWorker` to its own worker class (``worker_extension_cls``), so its methods are called through
``collective_rpc`` and only addresses, fitness and file names travel. A member's adapter is never written to disk: a
request's ``lora_path`` is an address, and the adapter is drawn from it when the engine needs it. Its factors are the
perturbation itself, ``lora_A = B^T`` and ``lora_B = sign sigma / sqrt(r) A``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.core.select import ParameterSpec
from eggroll.distributed.state import digest
from eggroll.errors import ModelError
from eggroll.torch.noise import Noise
from eggroll.torch.replica import Center

SCHEME = "eggroll"
"""What the path of an adapter that is drawn begins with."""


@dataclass(frozen=True)
class MemberAddress:
    """A member as the path of an adapter: everything that its factors depend on besides the run's settings."""

    generation: int
    member: int
    sigma: float

    def path(self) -> str:
        """The address as text, sigma without loss."""
        return f"{SCHEME}:{self.generation}:{self.member}:{self.sigma.hex()}"

    @classmethod
    def parse(cls, path: str) -> MemberAddress | None:
        """The inverse of :meth:`path`; ``None`` for the path of an ordinary adapter."""
        scheme, _, rest = path.partition(":")
        if scheme != SCHEME:
            return None
        generation, member, sigma = rest.split(":", 2)
        return cls(int(generation), int(member), float.fromhex(sigma))


class EggrollWorker:
    """Methods that vLLM's workers get; all names begin with ``eggroll_``, since they share the worker's namespace."""

    model_runner: Any  # of the worker that this class is mixed into
    model_config: Any
    load_config: Any
    device: torch.device

    def eggroll_set_up(self, config: dict[str, Any], specs: Sequence[Sequence[Any]], dtype: str) -> list[str]:
        """Take the settings, read the evolved weights from the model's files, and serve addresses as adapters.

        Args:
            config: an :class:`ESConfig` as a dict.
            specs: name, shape and kind of each evolved parameter, in the checkpoint's names.
            dtype: of the engine's weights, such as ``float32``.

        Returns:
            Names that cannot be evolved here: not in the model's files, or not a matrix that takes an adapter.
        """
        self.eggroll_config = ESConfig.from_dict(config)
        self.eggroll_specs = [ParameterSpec(name, tuple(shape), kind) for name, shape, kind in specs]
        manager = self.model_runner.lora_manager
        self.eggroll_groups = _Groups.of(manager._adapter_manager, self.eggroll_specs)
        tensors = self._eggroll_read_files(getattr(torch, dtype))
        missing = [spec.name for spec in self.eggroll_specs if spec.name not in tensors]
        missing += [spec.name for spec in self.eggroll_specs if not self.eggroll_groups.takes(spec.name)]
        if missing:
            return missing
        names = {spec.name for spec in self.eggroll_specs}
        parameters = {
            spec.name: nn.Parameter(tensors[spec.name].to(self.device), requires_grad=False)
            for spec in self.eggroll_specs
        }
        self.eggroll_siblings = {name: tensor for name, tensor in tensors.items() if name not in names}
        settings = self.eggroll_config
        noise = Noise(self.eggroll_specs, settings.rank, settings.seed, settings.noise_reuse)
        self.eggroll_center = Center(parameters, noise, settings)
        self._eggroll_drawn: tuple[tuple[int, int], dict[str, tuple[Tensor, Tensor]]] | None = None
        ordinary = manager._load_adapter

        def load_adapter(request: Any) -> Any:
            address = MemberAddress.parse(request.lora_path)
            return ordinary(request) if address is None else self._eggroll_adapter(request.lora_int_id, address)

        manager._load_adapter = load_adapter
        # What draws is compiled at its first use: here, because vLLM takes a step of 300 s for a dead engine.
        self._eggroll_factors(0, 0)
        return []

    def eggroll_prepare(self, generation: int) -> float:
        """Draw a generation's noise now if it is small enough to be kept; returns the number of normals."""
        config = self.eggroll_config
        pairs = config.population_size // 2 if config.antithetic else config.population_size
        self.eggroll_center.noise.prepare(generation, pairs, self.device)
        return float(pairs * self.eggroll_center.noise.draw_size)

    def eggroll_apply(self, record: str) -> list[float | None]:
        """Rebuild one update from its record and write it into the engine's weights.

        Returns:
            The norm of the change, and its cosine with the change before.
        """
        norm = self.eggroll_center.apply(UpdateRecord.from_json(record))
        self._eggroll_write()
        return [norm, self.eggroll_center.updater.turning.cosine]

    def eggroll_digest(self) -> str:
        """A digest of the evolved weights and their masters, equal on workers that hold the same bits."""
        return digest(self.eggroll_center.state_tensors())

    def eggroll_save(self, path: str) -> None:
        """Write the state (evolved weights, masters, optimizer) to a safetensors file; the first worker does."""
        if getattr(self, "rank", 0) == 0:
            state = self.eggroll_center.state_tensors()
            save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, path)

    def eggroll_load(self, path: str) -> None:
        """Put back what :meth:`eggroll_save` wrote, in the engine too.

        Only the first worker is sure to be on the machine where the file is; the others get its tensors from it.
        """
        from vllm.distributed.parallel_state import get_world_group

        world = get_world_group()
        state = world.broadcast_tensor_dict(load_file(path) if world.is_first_rank else None, src=0)
        self.eggroll_center.load_state_tensors(state)
        self._eggroll_write()

    @torch.no_grad()
    def eggroll_read(self, name: str) -> Any:
        """A weight as the engine's own layer multiplies with it, whatever layout it keeps: the product with 1.

        Under tensor parallelism it is the part that this worker holds.
        """
        layer, part = self.eggroll_groups.layer_and_part(name)
        base = layer.base_layer
        eye = torch.eye(layer.input_size, device=self.device, dtype=self.model_config.dtype)
        product = base.quant_method.apply(base, eye, None)
        return product.T[part].float().cpu().tolist()

    def _eggroll_adapter(self, adapter_id: int, address: MemberAddress) -> Any:
        """The adapter of a member, drawn: both members of a pair share the tensor of ``lora_A``."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        config, manager = self.eggroll_config, self.model_runner.lora_manager
        pair, sign = (address.member // 2, 1 - 2 * (address.member % 2)) if config.antithetic else (address.member, 1)
        scale = sign * address.sigma / config.rank**0.5
        tensors: dict[str, Tensor] = {}
        for name, (a, b_t) in self._eggroll_factors(address.generation, pair).items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = b_t
            tensors[f"{module}.lora_B.weight"] = a * scale
        mapper = getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None)
        modules = sorted({spec.name.split(".")[-2] for spec in self.eggroll_specs})
        return LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper(r=config.rank, lora_alpha=config.rank, target_modules=modules),  # alpha = r: no scale of its own
            device=str(self.device),
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )

    def _eggroll_factors(self, generation: int, pair: int) -> dict[str, tuple[Tensor, Tensor]]:
        """``name -> (A (m, r), B^T (r, n))`` of a pair; the last one is kept, since its two members come together."""
        if self._eggroll_drawn is None or self._eggroll_drawn[0] != (generation, pair):
            draws = self.eggroll_center.noise.draw(generation, [pair], self.device)
            factors = {}
            for spec in self.eggroll_specs:
                a, b = self.eggroll_center.noise.factors(spec, draws[spec.name])
                factors[spec.name] = (
                    a[0],
                    b[0].T.contiguous().to(self.model_runner.lora_manager.lora_config.lora_dtype),
                )
            self._eggroll_drawn = ((generation, pair), factors)
        return self._eggroll_drawn[1]

    def _eggroll_read_files(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The evolved tensors, and those that share a fused layer with one of them, from the model's files."""
        from vllm.model_executor.model_loader import get_model_loader

        loader = get_model_loader(self.load_config)
        model = self.model_runner.get_model()
        return {
            name: tensor.to(dtype).clone()
            for name, tensor in loader.get_all_weights(self.model_config, model)
            if self.eggroll_groups.holds(name)
        }

    @torch.no_grad()
    def _eggroll_write(self) -> None:
        """Load the current weights into the layers that hold them, through vLLM's own loaders and its repacking.

        Only those layers are opened: what else the model has stays as it is. All adapters are dropped, because they
        belonged to the center before.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        layers = self.eggroll_groups.layers()
        with set_current_vllm_config(self.model_runner.vllm_config):
            for layer in layers:
                initialize_layerwise_reload(layer)
            model.load_weights(self._eggroll_weights())
            for layer in layers:
                finalize_layerwise_reload(layer, self.model_config)
        self.model_runner.reset_lora_state()
        self._eggroll_drawn = None

    def _eggroll_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all opened layers, layer by layer, so that vLLM holds one of them at a time."""
        parameters = self.eggroll_center.updater.parameters
        for names in self.eggroll_groups.tensors(parameters, self.eggroll_siblings):
            for name in names:
                yield name, parameters[name].detach() if name in parameters else self.eggroll_siblings[name]


class _Groups:
    """Which of vLLM's layers holds which of the checkpoint's matrices: ``qkv_proj`` holds three."""

    def __init__(self, modules: dict[str, Any], children: dict[str, list[str]], mapper: Any) -> None:
        self._modules, self._children, self._mapper = modules, children, mapper
        self._layer_of: dict[str, str] = {}

    @classmethod
    def of(cls, manager: Any, specs: Sequence[ParameterSpec]) -> _Groups:
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        names = None if mapper is None else mapper.get_rename_mapper()
        made = cls(manager.modules, manager.packed_modules_mapping, names)
        for spec in specs:
            layer = made._find(spec.name)
            if layer is not None:
                made._layer_of[spec.name] = layer
        return made

    def takes(self, name: str) -> bool:
        """Whether a parameter is the weight of a linear layer that takes adapters."""
        return name in self._layer_of

    def holds(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to a layer of which something is evolved."""
        return self._find(name) in set(self._layer_of.values())

    def layers(self) -> list[Any]:
        """The layers themselves, without their adapters."""
        return [self._modules[name].base_layer for name in dict.fromkeys(self._layer_of.values())]

    def tensors(self, *held: Any) -> list[list[str]]:
        """The checkpoint's names of each layer's tensors."""
        found: dict[str, list[str]] = {name: [] for name in dict.fromkeys(self._layer_of.values())}
        for names in held:
            for name in names:
                found[str(self._find(name))].append(name)
        return list(found.values())

    def layer_and_part(self, name: str) -> tuple[Any, slice]:
        """The layer with adapters that holds a parameter, and its rows there."""
        path = self._layer_of[name]
        layer, child = self._modules[path], name.split(".")[-2]
        siblings = self._children.get(path.rpartition(".")[2], [child])
        if child not in siblings:
            return layer, slice(None)
        place = siblings.index(child)
        sizes = list(getattr(layer, "output_slices", ()))
        if len(siblings) == 1 or len(sizes) != len(siblings):
            return layer, slice(None)
        return layer, slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def _find(self, name: str) -> str | None:
        """The path of the layer in vLLM's model that holds a tensor of the checkpoint."""
        mapped = self._mapper._map_name(name) if self._mapper is not None else name
        if mapped is None:
            return None
        module, _, kind = mapped.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        parent, _, child = module.rpartition(".")
        candidates = [module, *(f"{parent}.{fused}" for fused, parts in self._children.items() if child in parts)]
        return next((path for path in candidates if _is_linear(self._modules.get(path))), None)


def _is_linear(layer: Any) -> bool:
    from vllm.model_executor.layers.linear import LinearBase

    return isinstance(getattr(layer, "base_layer", None), LinearBase)


def check_equal(results: Sequence[Any], what: str) -> Any:
    """The answer that all workers of one engine gave.

    Raises:
        ModelError: they differ, so the engine's parts no longer belong to one model.
    """
    first = results[0]
    if any(result != first for result in results[1:]):
        raise ModelError(
            f"the workers of the engine disagree about {what}: {list(dict.fromkeys(map(str, results)))}. "
            "They are on different hardware or versions; start the engine on equal devices, or resume from a checkpoint"
        )
    return first
