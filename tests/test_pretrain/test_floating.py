"""The same network in floating point."""

import dataclasses

import numpy as np
import pytest
import torch

from eggroll.errors import RunError
from eggroll.pretrain import kind
from eggroll.pretrain.model import oracle
from eggroll.pretrain.model.shape import ModelShape


def equal_tensors(first, second):
    tensors = first.state_tensors()
    return all(torch.equal(value, tensors[name]) for name, value in second.state_tensors().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_floating_point_trains_the_same_network(options, tmp_path, precision):
    settings = dataclasses.replace(options, precision=precision, population_size=32, generations=4, momentum_shift=0)
    whole = kind.train(settings)
    assert 4 < whole.result["validation_bits_per_byte"] < 10
    part = dataclasses.replace(settings, generations=4, output=str(tmp_path / "part"))
    worker = kind.make_worker(part, with_data=False)
    for record in whole.run.updates():
        worker.apply(record)
    assert equal_tensors(worker, whole.worker)
    assert equal_tensors(kind.model_of_run(settings.output), whole.worker)
    longer = dataclasses.replace(kind.options_of_run(settings.output), resume=settings.output, generations=8)
    with pytest.raises(RunError, match="generations: 4 in the run, 8 now"):  # the cosine ends with the last one
        kind.train(longer)
    assert len(worker.sample(b"abc", 5)) == 5
    assert worker.sample(b"abc", 5, temperature=0) == worker.sample(b"abc", 5, temperature=0)


def test_the_floating_point_network_is_the_integer_one_without_rounding():
    """With the integer model's weights over 16 its logits differ by what rounding does, a few sixteenths."""
    from eggroll.pretrain.model.floating import FloatModel

    shape = ModelShape(256, 64, 1)
    params, model = oracle.init_params(shape, 2), FloatModel(ModelShape(256, 64, 1), 0)
    names = {"emb.weight": "emb", "head.weight": "head", "ln_out": "ln_out"}
    for part in ("ln1", "ln2", "bf", "bh", "Wf", "Uf", "Wh", "Uh", "up", "down"):
        group = "" if part.startswith("ln") else "mlp." if part in ("up", "down") else "gru."
        suffix = ".weight" if part[0] in "WUud" else ""
        names[f"blocks.0.{part}{suffix}"] = f"blocks.0.{group}{part}"
    model.load_state_dict({key: torch.from_numpy(params[name]).float() / 16 for key, name in names.items()})
    tokens = np.array([0, 70, 105, 114, 0, 115])
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)[None])[0][0].numpy() * 16
    exact = oracle.forward(params, tokens)[0]
    assert np.abs(found - exact).mean() < 3
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.99
