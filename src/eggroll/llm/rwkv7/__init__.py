"""RWKV-7: the model, its checkpoints and its tokenizer, without code from a hub."""
