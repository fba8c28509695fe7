"""Tiny RWKV-7 models with random weights, and the files that hold them."""

import torch

from eggroll.llm.rwkv7.config import RWKV7Config
from eggroll.llm.rwkv7.model import RWKV7ForCausalLM
from eggroll.llm.rwkv7.weights import save_pth


def tiny_rwkv7(seed=0, vocab_size=300, width=64, layers=3, head_dim=32):
    """Every parameter is far from zero, so that a wrong one shows."""
    torch.manual_seed(seed)
    config = RWKV7Config(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, head_dim=head_dim, decay_low_rank_dim=16,
        a_low_rank_dim=12, v_low_rank_dim=8, gate_low_rank_dim=20, head_norm_eps=64e-5,
    )  # fmt: skip
    model = RWKV7ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        low_rank = name[-2:] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
        if parameter.ndim == 1 or low_rank:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def saved_pth(folder, model=None, name="tiny.pth"):
    """The path of an original file."""
    path = folder / name
    save_pth(model or tiny_rwkv7(), path)
    return path
