"""The zoo's fast cases are right, the zoo sees what is not, and its page says what its results say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population
from eggroll.torch.state import State

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import zoo  # noqa: E402
from zoo_cases import check, made_modules, shrink, table, torch_modules, transformers_models  # noqa: E402
from zoo_cases.case import Built, Case, NoCaseError  # noqa: E402
from zoo_cases.fast import FAST  # noqa: E402

sys.path.remove(str(ROOT / "scripts"))  # its tree.py would be taken for a package of that name


@pytest.fixture(scope="module")
def cases():
    modules = {name.split("/")[1] for name in FAST if name.startswith("torch/")}
    made = [*torch_modules.cases(modules), *transformers_models.cases(), *made_modules.cases()]
    return {case.name: case for case in made}


@pytest.mark.parametrize("name", FAST)
def test_fast_cases(name, cases):
    if name not in cases:
        pytest.skip("its library is not installed")
    with check.quiet():
        result = check.run_case(cases[name])
    assert result["overall"] == "right", json.dumps(result)
    assert result["deviation"] < 1e-4
    assert FAST[name] in (result["mode"], "any")
    if FAST[name] == "rows":
        assert result["block"]["status"] == "right", result


class Two(nn.Module):
    """A layer with a bias, and a norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(torch.tanh(self.layer(x)))


class BySize(nn.Module):
    """Right for the batches of single members, and otherwise the next member's outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return y if len(y) <= 2 else y.roll(2, 0)


def built(model):
    def inputs(member, rows):
        return (torch.randn((rows, 4), generator=torch.Generator().manual_seed(5 * member + rows)),), {}

    return Built(model.eval(), inputs, [0])


def result_of(model):
    return check.run_case(Case("made", lambda: built(model)))


def test_a_right_module():
    result = result_of(Two())
    assert (result["overall"], result["mode"], result["block"]["status"]) == ("right", "rows", "right")
    assert 0.001 < result["effect"] < 1.0
    assert result["slowdown"] > 0


@pytest.mark.parametrize("change", ["swapped", "center", "one bias", "half of sigma"])
def test_wrong_members_are_seen(change, monkeypatch):
    values = Population.values

    def changed(self, generation, members, context, *, sigma):
        made = values(self, generation, members, context, sigma=sigma * (0.5 if change == "half of sigma" else 1))
        if change == "one bias":
            made["layer.bias"].data_P.copy_(self.parameter("layer.bias")) if not context.single else None
            if context.single:
                made["layer.bias"] = self.parameter("layer.bias").detach().clone()
        return made

    def forward(self, *args, generation, **kwargs):
        if change == "center":
            return self.model(*args, **kwargs)
        return tree_map(lambda y: y.roll(2, 0), plain(self, *args, generation=generation, **kwargs))

    plain = Population.forward
    monkeypatch.setattr(Population, "values", changed)
    if change in ("swapped", "center"):
        monkeypatch.setattr(Population, "forward", forward)
    result = result_of(Two())
    assert result["status"] == result["overall"] == "wrong"
    assert result["deviation"] > 50 * check.TOLERANCE


def test_a_module_that_rolls_its_rows_is_not_taken_for_right_in_rows():
    result = result_of(BySize())
    assert result["overall"] == "right"
    assert result["mode"] in ("vmap", "loop")
    assert result["block"]["status"] == "refused"


@pytest.mark.parametrize(
    ("error", "status"), [(UnsupportedOperationError("no rule\nfor it"), "refused"), (KeyError("x"), "crashed")]
)
def test_errors_are_told_apart(error, status, monkeypatch):
    def forward(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(Population, "forward", forward)
    result = result_of(Two())
    assert (result["status"], result["overall"]) == (status, status)
    assert result["sentence"] == ("no rule for it" if status == "refused" else "KeyError: 'x'")


def test_a_model_that_is_another_one_afterwards_is_wrong(monkeypatch):
    monkeypatch.setattr(State, "restore", lambda self, strict=True: None)

    class Keeping(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            y = super().forward(x)
            self.seen.data = self.seen.data + 0.1
            return y + 0 * self.seen

    result = result_of(Keeping())
    assert result["overall"] == "wrong"
    assert "afterwards" in json.dumps(result)


def test_what_cannot_be_compared_is_no_case():
    def none():
        raise NoCaseError("nothing to compare with")

    assert check.run_case(Case("none", none))["status"] == "no case"


def test_configurations_become_small():
    transformers = pytest.importorskip("transformers")
    config = shrink.shrunk(transformers.Gemma3Config)
    text = config.text_config
    assert (text.hidden_size, text.vocab_size, text.num_attention_heads) == (32, shrink.VOCABULARY, 4)
    assert text.layer_types == ["sliding_attention", "full_attention"], "both kinds of layers are kept"
    assert text.num_hidden_layers == 2
    assert config.vision_config.image_size <= 32


def results():
    right = {"case": "transformers/llama", "what": "Llama", "status": "right", "mode": "rows", "deviation": 1e-5,
             "slowdown": 3.0, "block": {"status": "right", "deviation": 2e-5},
             "generation": {"status": "right", "mode": "rows", "deviation": 3e-5}, "overall": "right"}  # fmt: skip
    refused = {**right, "case": "transformers/other", "mode": "loop", "overall": "right",
               "block": {"status": "refused", "sentence": "an output of shape (3, 1) mixes 'x'"}}  # fmt: skip
    wrong = {**right, "case": "torch/nn.Odd/0", "status": "wrong", "overall": "wrong", "sentence": "off by | 1"}
    return [right, refused, wrong, {"case": "torch/nn.None/0", "status": "no case", "sentence": "no batch"}]


def test_the_page_says_what_was_found():
    page = table.page(results())
    assert "| architectures of transformers | 2 | 1 | 0 | 1 | 0 | 0 | 0 | 3.0x | 2 rows |" in page
    assert "| llama | `Llama` | rows | 3.0x | 3e-05 | right | rows |" in page
    assert "| torch/nn.Odd/0 | auto | wrong | off by \\| 1 |" in page
    assert "| 1 | transformers/other | an output of shape (3, 1) mixes 'x' |" in page
    assert "1 of PyTorch's cases: no batch" in page


def test_the_page_in_docs_is_that_of_the_results():
    found = zoo.read(zoo.RESULTS)
    assert not {"wrong", "crashed"} & set(map(zoo.overall, found))
    right = [result for result in found if zoo.overall(result) == "right"]
    assert sum(result["case"].startswith("transformers/") for result in right) >= 300
    assert table.PAGE.read_text(encoding="utf-8") == table.page(found), "run: python scripts/zoo.py --table"


def test_results_are_read_and_sorted(tmp_path):
    path = tmp_path / "zoo.jsonl"
    lines = [
        {"case": "a/10", "status": "right"},
        {"case": "a/9", "status": "wrong"},
        {"case": "a/9", "status": "right"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"case": "cut', encoding="utf-8")
    zoo.compact(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [lines[2], lines[0]]


@pytest.mark.slow
def test_a_case_that_takes_too_long_costs_only_itself(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # for the processes that it starts
    found = {r["case"]: r for r in zoo.run(["torch/nn.Linear/0", "torch/none/0", "torch/nn.Linear/1"], 1, 30.0)}
    assert [zoo.overall(found[name]) for name in ("torch/nn.Linear/0", "torch/none/0", "torch/nn.Linear/1")] == [
        "right",
        "crashed",
        "right",
    ]
    worker = zoo.Worker()
    worker.give("torch/nn.Linear/0")
    worker.end()
    assert worker.lost("not done")["status"] == "crashed"
