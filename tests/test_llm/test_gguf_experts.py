"""GGUF files with a mixture of experts: read as transformers reads them, or refused in one sentence."""

import pytest
import torch
import transformers
from tiny_models import write_gguf

from eggroll import llm
from eggroll.errors import ModelError
from eggroll.llm.models.export import save_pretrained
from eggroll.llm.models.gguf_file import save_gguf
from eggroll.torch.quantized.adopt import grids

DENSE = {"blk.0.ffn_gate": None, "blk.0.ffn_up": None, "blk.0.ffn_down": None}
EXPERTS = {
    "blk.0.ffn_gate_inp": (4, 64), "blk.0.ffn_gate_exps": (4, 96, 64), "blk.0.ffn_up_exps": (4, 96, 64),
    "blk.0.ffn_down_exps": (4, 64, 96),
}  # fmt: skip
SHARED = {
    "blk.0.ffn_gate_inp_shexp": (64,), "blk.0.ffn_gate_shexp": (160, 64), "blk.0.ffn_up_shexp": (160, 64),
    "blk.0.ffn_down_shexp": (64, 160), "blk.0.attn_q.bias": (64,), "blk.0.attn_k.bias": (32,),
    "blk.0.attn_v.bias": (32,),
}  # fmt: skip
FIELDS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}
KINDS = {
    "qwen2moe": ({**FIELDS, "expert_shared_feed_forward_length": 160}, SHARED),
    "qwen3moe": ({**FIELDS, "key_length": 32}, {"blk.0.attn_q_norm": (32,), "blk.0.attn_k_norm": (32,)}),
}


def write(path, architecture, kind="Q8_0"):
    fields, tensors = KINDS[architecture]
    return write_gguf(path, kind, architecture, fields=fields, tensors={**DENSE, **EXPERTS, **tensors})


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
@pytest.mark.parametrize("architecture", KINDS)
def test_experts_are_expanded_and_everything_else_is_kept(architecture, kind, tmp_path):
    path = write(tmp_path / "experts.gguf", architecture, kind)
    plain = llm.load(str(path), dtype="float32", quantize="none").model
    assert plain.config.moe_intermediate_size == 96  # transformers itself leaves its default
    own = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype="float32", config=plain.config
    )
    state = plain.state_dict()
    assert state.keys() == own.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in own.state_dict().items())
    assert not hasattr(plain, "gguf_source")

    loaded = llm.load(str(path), dtype="float32")
    held = grids(loaded.model)
    assert bool(held) == (kind == "Q8_0")
    assert not any("experts.gate_up_proj" in name or "experts.down_proj" in name for name in held)
    torch.testing.assert_close(logits(loaded.model), logits(own.eval()), rtol=1e-4, atol=1e-4)
    assert save_gguf(loaded.model, tmp_path / "same.gguf").read_bytes() == path.read_bytes()
    if kind == "Q8_0":
        assert loaded.model.gguf_source.expanded["Q8_0"] >= 3
        assert "expanded to floating point" in loaded.notes[-1]


def test_experts_that_changed_are_saved_as_a_directory(tmp_path):
    loaded = llm.load(str(write(tmp_path / "a.gguf", "qwen3moe")), dtype="float32")
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.experts.gate_up_proj[1, 2, 3] += 0.5
    with pytest.raises(ModelError, match=r"gate_up_proj' is in a form in the GGUF file that cannot be written"):
        save_gguf(loaded.model, tmp_path / "b.gguf")
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    again = llm.load(str(saved), dtype="float32").model
    torch.testing.assert_close(logits(again), logits(loaded.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["auto", "none"])
@pytest.mark.parametrize(
    "experts", [EXPERTS, {"blk.0.ffn_gate_inp": (4, 64), "blk.0.ffn_gate.0": (96, 64)}], ids=["together", "each"]
)
def test_experts_of_mixtral_are_refused(experts, quantize, tmp_path):
    path = write_gguf(tmp_path / "mixtral.gguf", fields={"expert_count": 4}, tensors={**DENSE, **experts})
    message = (
        r"holds a mixture of experts \(blk\.0\.ffn_gate.*\) of architecture 'llama', of which transformers .* cannot"
    )
    with pytest.raises(ModelError, match=message):
        llm.load(str(path), dtype="float32", quantize=quantize)


@pytest.mark.parametrize("quantize", ["auto", "none"])
def test_a_file_that_lacks_tensors_is_refused(quantize, tmp_path):
    path = write_gguf(tmp_path / "part.gguf", tensors={"blk.0.ffn_up": None})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's parameters \(the first is 'model.layers.0.mlp.up_pr"):
        llm.load(str(path), dtype="float32", quantize=quantize)
