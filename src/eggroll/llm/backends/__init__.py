"""Backends: who writes and scores. PyTorch in this process, a vLLM engine, or a pool of workers."""
