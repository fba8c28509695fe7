"""A tiny tokenizer and a tiny Llama on disk, also as a GGUF file, made from configurations: nothing is downloaded."""

import gguf
import numpy as np
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


def gguf_blocks(values, kind):
    """Numbers in blocks; of K-quants, which gguf cannot make, random codes with small scales."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        generator = np.random.default_rng(values.size)
        blocks = generator.integers(0, 256, (*values.shape[:-1], values.shape[-1] // weights, size), dtype=np.uint8)
        halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
        for place in halves:
            scales = generator.normal(scale=0.01, size=blocks.shape[:-1]).astype(np.float16)
            blocks[..., place : place + 2] = scales[..., None].view(np.uint8)
        return blocks.reshape(*values.shape[:-1], -1)


def write_gguf(path, kind="Q8_0", architecture="llama", width=64, fields=None, tensors=None):
    """A Llama of one layer with random weights and a byte-level tokenizer, its matrices in blocks of ``kind``.

    Or one of another architecture, with other ``fields`` and ``tensors`` (shapes by name; ``None``: not there).
    """
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {
        "context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": 96, "head_count": 2,
        "head_count_kv": 1, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": width // 2, "vocab_size": 256,
        **(fields or {}),
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*byte_tokenizer().convert_ids_to_tokens(range(255)), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (256, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // 2, width), "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (96, width), "blk.0.ffn_up": (96, width),
        "blk.0.ffn_down": (width, 96), **(tensors or {}),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        if shape is None:
            continue
        own = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        name = name if name.endswith(".bias") else f"{name}.weight"
        writer.add_tensor(name, gguf_blocks(generator.normal(size=shape).astype(np.float32), own), raw_dtype=own)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path
