"""Models whose layers keep a state: their cache is not cut by rows, they go through their own ``generate``."""

import pytest
import torch
import transformers
from tiny_models import SIZES

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm.data.examples import load_examples

SMALL = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
SHARED = "all of these prompts begin alike: "
PROMPTS = [SHARED + text for text in ("a", "bc", "a much longer prompt", "bd")]


def minimax():
    config = transformers.MiniMaxConfig(**{**SMALL, "num_hidden_layers": 3}, num_local_experts=2)
    assert config.layer_types == ["full_attention", "linear_attention", "full_attention"]
    return transformers.MiniMaxForCausalLM(config)


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def lfm2():
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize("build", [minimax, qwen3_next, lfm2])
def test_rows_that_end_early(build, tiny_tokenizer):
    """MiniMax calls such a layer linear_attention, and cutting its cache was an index error."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    config = EggrollConfig(population_size=2, max_tokens=10, chat=False, target_modules=["q_proj"])
    evaluator = EggrollTrainer(model, config, len, tiny_tokenizer).worker.evaluator
    evaluator.eos_ids = ends = list(range(0, 300, 4))
    evaluator.prepare(0)
    evaluator.population.mode = "rows"
    with evaluator.perturbed(0, range(2), 0.0) as active:  # both are the center
        made, _ = evaluator.complete(load_examples(PROMPTS), active, 0, range(2))
    encoded = tiny_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    out = model.generate(**encoded, max_new_tokens=10, do_sample=False, eos_token_id=ends, pad_token_id=258)
    expected = []
    for row in out[:, encoded.input_ids.shape[1] :].tolist():
        until = next((at for at, token in enumerate(row) if token in ends), len(row))
        expected.append(tiny_tokenizer.decode(row[:until], skip_special_tokens=True))
    assert made == expected * 2
    assert len(set(map(len, made))) > 1
