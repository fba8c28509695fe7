"""A program: the original package's logits of the models in a folder, read at once and token by token.

A process of its own, as the package changes PyTorch's precision for the whole process when it is imported.
"""

import os
import sys
from pathlib import Path

os.environ.update({"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"})

import torch
from rwkv.model import RWKV

for path in sorted(Path(sys.argv[1]).glob("*.pth")):
    model = RWKV(model=str(path).removesuffix(".pth"), strategy="cpu fp32")
    ids = torch.load(path.with_suffix(".ids"), weights_only=True).tolist()
    at_once, _ = model.forward(ids, None, full_output=True)
    state, steps = None, []
    for token in ids:
        logits, state = model.forward([token], state)
        steps.append(logits.clone())
    torch.save({"at once": at_once, "steps": torch.stack(steps)}, path.with_suffix(".logits"))
