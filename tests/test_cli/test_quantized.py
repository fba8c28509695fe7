"""The command line with quantized models: tuning moves codes, resumes and replays bit for bit, and saves the format."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_gguf, write_llama

from eggroll import llm
from eggroll.core.settings import from_json_values, to_json_values
from eggroll.llm.options import TuneOptions
from eggroll.torch.quantized.adopt import grids

SETTINGS = [
    *("-r", "score.py", "--prompts", "prompts.txt", "--eval-prompts", "held.txt", "--batch-size", "2", "-p", "8"),
    *("--rank", "2", "--sigma", "0.05", "--lr", "2.0", "--max-tokens", "4", "--dtype", "float32"),
    *("--report-to", "none", "--eval-every", "2"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A GGUF file, and a directory with plain weights."""
    folder = tmp_path_factory.mktemp("quantized")
    write_gguf(folder / "tiny.gguf", "Q4_1")
    write_llama(folder / "plain", hidden_size=64, intermediate_size=96)
    return folder


def test_runs_from_before_residuals_began_at_random_go_on_from_zero():
    stored = to_json_values(TuneOptions(model="m", reward="zeros", output="o"))
    assert stored.pop("residual_start") == "uniform"
    assert from_json_values(TuneOptions, stored, source="config.json").residual_start == "zero"


@pytest.mark.parametrize(("model", "form"), [("tiny.gguf", "auto"), ("plain", "int8")])
def test_tune_resume_and_replay(eggroll, sources, model, form):
    source, settings = sources / model, [*SETTINGS, "--quantize", form]
    done = eggroll("tune", source, *settings, "-g", "4", "-o", "whole")
    assert done.status == 0, done.err
    assert "quantized: " in done.out
    assert eggroll("tune", source, *settings, "-g", "2", "-o", "part").status == 0
    assert eggroll("tune", "--resume", "part", "-g", "4").status == 0
    whole, part = eggroll.work / "whole", eggroll.work / "part"
    assert (whole / "updates.jsonl").read_bytes() == (part / "updates.jsonl").read_bytes()
    if form == "auto":
        assert (whole / "model/model.gguf").read_bytes() == (part / "model/model.gguf").read_bytes()
    else:  # torchao's notes in the file's header have no fixed order
        ours, theirs = (load_file(run / "model/model.safetensors") for run in (whole, part))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert eggroll("replay", "whole").status == 0

    before, after = (grids(llm.load(str(x), dtype="float32", quantize=y).model) for x, y in (
        (source, form), (eggroll.work / "whole/model", "auto")))  # fmt: skip
    evolved = [name for name in before if "embed" not in name]
    moved = sum(int((before[name].codes() != after[name].codes()).sum()) for name in evolved)
    assert moved > 20
    assert before.keys() == after.keys()
    assert all(before[name].quanta().equal(after[name].quanta()) for name in before)


def test_runs_from_before_this_setting_had_expanded_weights(eggroll, sources):
    assert eggroll("tune", sources / "tiny.gguf", *SETTINGS, "--quantize", "none", "-g", "1", "-o", "run").status == 0
    for path in (eggroll.work / "run").rglob("config.json"):
        values = json.loads(path.read_text())
        for part in (values, values.get("options", {})):
            part.pop("quantize", None)
        values.pop("check", None)  # what a hand that edits the file removes
        path.write_text(json.dumps(values))
    resumed = eggroll("tune", "--resume", "run", "-g", "2", "--accept-changes")
    assert resumed.status == 0, resumed.err
    assert "quantized: " not in resumed.out


def test_info_and_eval(eggroll, sources):
    shown = eggroll("info", sources / "tiny.gguf", "-p", "8")
    assert shown.status == 0, shown.err
    for row in ("codes of quantized weights", "their scales", "residual of their updates"):
        assert row in shown.out
    models = (sources / "tiny.gguf", sources / "plain")
    done = eggroll("eval", *models, "--quantize", "auto", "--task", "zeros", "--problems", "2", "--max-tokens", "4")
    assert done.status == 0, done.err


def test_refusals(eggroll, sources):
    refused = eggroll("tune", sources / "plain", *SETTINGS, "--quantize", "gguf", "-g", "1")
    assert refused.status == 1
    assert "has no GGUF file; give a .gguf file" in " ".join(refused.err.split())
    refused = eggroll("tune", sources / "plain", *SETTINGS, "--quantize", "int8", "--backend", "vllm", "-g", "1")
    assert refused.status == 1
    assert "are quantized (quantize='int8'), which needs backend='torch'" in " ".join(refused.err.split())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "form"), [("tiny.gguf", "auto"), ("plain", "int8")])
def test_workers_end_with_the_same_codes(eggroll, sources, model, form):
    pytest.importorskip("ray", reason="ray is not installed")
    settings = [sources / model, *SETTINGS, "--quantize", form, "-g", "2"]
    assert eggroll("tune", *settings, "-o", "alone").status == 0
    assert eggroll("tune", *settings, "--workers", "1", "-o", "apart").status == 0
    alone, apart = (
        grids(llm.load(str(eggroll.work / run / "model"), dtype="float32").model) for run in ("alone", "apart")
    )
    assert alone.keys() == apart.keys()
    assert all(torch.equal(alone[name].codes(), apart[name].codes()) for name in alone)
