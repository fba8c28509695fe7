"""Tiny models and a tiny tokenizer, made from configurations: nothing is downloaded."""

import pytest
import torch
import transformers
from tiny_models import CHAT_TEMPLATE, SIZES, byte_tokenizer


@pytest.fixture
def tiny_tokenizer():
    """Byte-level, 262 tokens, with a chat template; padding on the left."""
    tokenizer = byte_tokenizer(padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def plain_tokenizer():
    """The same without a chat template and without a pad token."""
    return byte_tokenizer(pad_token=None)


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def _gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300))


def _gemma2():
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05)
    return transformers.Gemma2ForCausalLM(config)


def _cohere():
    config = transformers.CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=7.0)
    return transformers.CohereForCausalLM(config)


def _granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=0.2)
    )


def _mixtral():
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    config._experts_implementation = "eager"  # the other ones have no float64
    return transformers.MixtralForCausalLM(config)


def _mamba():
    config = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=300)
    return transformers.MambaForCausalLM(config)


def _t5():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=300,
                                   decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart():
    config = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                     decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=300,
                                     max_position_embeddings=64)  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


BUILDERS = {
    "llama": _llama, "gpt2": _gpt2, "gemma2": _gemma2, "cohere": _cohere, "granite": _granite, "mixtral": _mixtral,
    "mamba": _mamba, "t5": _t5, "bart": _bart,
}  # fmt: skip


@pytest.fixture
def build_model():
    """``build_model("llama")``: a tiny model with fixed random weights, in evaluation mode."""

    def build(name, dtype=torch.float32):
        torch.manual_seed(0)
        model = BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model.to(dtype).eval()

    return build


@pytest.fixture
def tiny_model(build_model):
    """A tiny Llama."""
    return build_model("llama")
