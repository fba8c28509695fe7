"""A tiny tokenizer and a tiny Llama on disk, made from configurations: nothing is downloaded."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def byte_tokenizer(**kwargs):
    """A byte-level tokenizer without merges: every text is its bytes, and decodes to itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**settings, **kwargs})
    made.add_tokens(["<|user|>", "<|assistant|>", "<|system|>"], special_tokens=True)
    return made


def write_llama(folder, **changes):
    """A Llama with random weights and the byte-level tokenizer with a chat template, in ``folder``.

    It has 26,000 parameters with ``SIZES``; ``changes`` are fields of its configuration.
    """
    tokenizer = byte_tokenizer(padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    sizes = {**SIZES, "num_key_value_heads": 2, **special, **changes}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, "vocab_size": len(tokenizer)}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
