"""Changes of matrices as a PEFT adapter: truncated singular value decompositions, with the error that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from eggroll.errors import ConfigError, ModelError
from eggroll.llm.models.export import METADATA_FILE


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds of the change that it stands for.

    Attributes:
        rank: of the adapter.
        relative_error: ``|change - adapter| / |change|`` over all matrices (Frobenius norm); 0 is exact.
        full_rank: the largest rank of a change (numerically), which an exact adapter would need.
        directory: where it is.
    """

    rank: int
    relative_error: float
    full_rank: int
    directory: str


def save_adapter(
    changes: Mapping[str, Tensor], directory: str | Path, *, rank: int, base_model: str, metadata: Mapping[str, Any]
) -> AdapterReport:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT reads them.

    Args:
        changes: ``name -> W_after - W_before (m, n)``, float32, for weights of linear layers.
        directory: where to; made if it does not exist.
        rank: of the adapter; larger ones than a matrix has are cut.
        base_model: what the changes are relative to.
        metadata: further entries of ``eggroll.json``.

    Raises:
        ConfigError: the rank is below 1.
        ModelError: the directory cannot be written.
    """
    if rank < 1:
        raise ConfigError(f"rank (={rank}) of an adapter must be at least 1")
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    full = 0
    for name, change in changes.items():
        u, s, vt = torch.linalg.svd(change.double(), full_matrices=False)
        k = min(rank, len(s))
        root = s[:k].sqrt()
        module = f"base_model.model.{name.removesuffix('.weight')}"
        # Zeros at the end: all matrices of an adapter have one rank.
        left, right = F.pad(u[:, :k] * root, (0, rank - k)), F.pad(root[:, None] * vt[:k], (0, 0, 0, rank - k))
        tensors[f"{module}.lora_B.weight"] = left.float().contiguous()
        tensors[f"{module}.lora_A.weight"] = right.float().contiguous()
        lost += float(s[k:].square().sum())
        total += float(s.square().sum())
        floor = float(s[0]) * max(change.shape) * torch.finfo(torch.float32).eps if len(s) else 0.0
        full = max(full, int((s > floor).sum()))
    report = AdapterReport(rank, (lost / total) ** 0.5 if total else 0.0, full, str(directory))
    modules = sorted({name.split(".")[-2] for name in changes})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": modules, "inference_mode": True,
        "fan_in_fan_out": False,
    }  # fmt: skip
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        details = {"base_model": base_model, "adapter": asdict(report), **metadata}
        (folder / METADATA_FILE).write_text(json.dumps(details, indent=2, default=str) + "\n")
    except OSError as error:
        raise ModelError(f"the adapter cannot be saved to {folder}: {error}. Give another directory") from error
    return report
