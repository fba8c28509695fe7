"""What a grid keeps of a change: from 0 nothing below half a quantum, from a random start its share of codes."""

import torch
from tiny_models import write_gguf

from eggroll.torch.quantized.adopt import grids


def test_a_change_of_three_tenths_of_a_quantum(load, tmp_path, monkeypatch):
    rounding = load("quantized/rounding")
    write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    read = rounding.llm.load
    monkeypatch.setattr(rounding.llm, "load", lambda name, quantize: read(str(tmp_path / "tiny.gguf"), quantize="auto"))
    start = grids(rounding.llm.load("", "").model)
    codes = {name: grid.codes().float() for name, grid in start.items()}
    change = {name: 0.3 * grid.quanta().repeat_interleave(32, dim=1) for name, grid in start.items()}

    def moves(loaded):
        """The mean move of the codes that can go up."""
        found = grids(loaded.model)
        each = [(found[name].codes().float() - codes[name])[codes[name] < grid.high] for name, grid in start.items()]
        return float(torch.cat(each).mean())

    monkeypatch.setattr(rounding, "score", moves)
    still, sizes = rounding.moved(change, "zero", 0)
    assert still == 0.0
    torch.testing.assert_close(sizes[sizes > 0], torch.full_like(sizes[sizes > 0], 0.3))
    assert abs(rounding.moved(change, "uniform", 0)[0] - 0.3) < 0.03
