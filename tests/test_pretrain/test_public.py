"""The public names, and that they cost nothing before they are used."""

import subprocess
import sys

import numpy as np

import eggroll.pretrain

NAMES = [
    "ModelShape", "PretrainOptions", "forward", "init_params", "log_likelihood", "make_engine", "model_of_run",
    "options_of_run", "sample_run", "train",
]  # fmt: skip


def test_public_names():
    assert eggroll.pretrain.__all__ == dir(eggroll.pretrain) == NAMES
    assert all(hasattr(eggroll.pretrain, name) for name in NAMES)


def test_they_are_loaded_on_first_use():
    code = "import sys, eggroll.pretrain; eggroll.pretrain.PretrainOptions(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_model_without_a_run():
    params = eggroll.pretrain.init_params(eggroll.pretrain.ModelShape(256, 16, 1), seed=1)
    text = np.frombuffer(b"\0to be", np.uint8)
    logits, state = eggroll.pretrain.forward(params, text)
    assert (logits.shape, state.shape) == ((6, 256), (1, 16))
    assert eggroll.pretrain.log_likelihood(logits[:-1], text[1:]).shape == (5,)
