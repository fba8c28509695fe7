"""The cases that the tests run: every kind of layer, in well under half a minute."""

from __future__ import annotations

# The mode in which a case is right today and must stay so; "any" where another one may become possible.
FAST: dict[str, str] = {
    "torch/nn.Linear/0": "rows",
    "torch/nn.Bilinear/0": "rows",
    "torch/nn.Embedding/0": "rows",
    "torch/nn.Conv1d/0": "rows",
    "torch/nn.Conv2d/0": "rows",
    "torch/nn.Conv3d/0": "rows",
    "torch/nn.ConvTranspose2d/0": "rows",
    "torch/nn.LayerNorm/0": "rows",
    "torch/nn.GroupNorm/0": "rows",
    "torch/nn.BatchNorm2d/0": "rows",
    "torch/nn.PReLU/3": "rows",
    "torch/nn.MultiheadAttention/0": "rows",
    "torch/nn.TransformerEncoderLayer/0": "rows",
    "torch/nn.LSTM/0": "any",
    "torch/nn.L1Loss/0": "vmap",
    "torch/nn.CrossEntropyLoss/0": "any",
    "torch/nn.Softmax/0": "rows",
    "transformers/llama": "rows",
    "transformers/gpt2": "rows",
    "transformers/qwen3_moe": "rows",
    "transformers/mamba": "rows",
    "transformers/bert": "rows",
    "transformers/bart": "rows",
    "transformers/t5": "rows",
    "transformers/vit": "rows",
    "transformers/resnet": "rows",
    "transformers/wav2vec2": "rows",
}
