"""A resumed run reads what it read when it was begun, or an error says what has changed."""

import pytest
from safetensors.torch import load_file, save_file

from eggroll.run.run_dir import RunDir


def refused(done):
    assert done.status == 1, done.out
    return done.err


@pytest.fixture
def base(eggroll, model_dir):
    """A finished run of two generations, with a model and a helper of the reward that a test may change."""
    work = eggroll.work
    (work / "tiny").unlink()
    (work / "tiny").mkdir()
    for file in model_dir.iterdir():
        (work / "tiny" / file.name).write_bytes(file.read_bytes())
    (work / "score.py").write_text("import helper\ndef score(text):\n    return helper.total(text)\n")
    (work / "helper.py").write_text("def total(text):\n    return -float(sum(map(ord, text)) % 97)\n")
    assert eggroll.tune("-g", "2", "-o", "base", "--eval-prompts", "held.txt", "--target-modules", "q_proj").status == 0
    return work / "base"


def test_what_a_run_reads(eggroll, base):
    """Rows added, the reward's sign turned in a file that it imports, a frozen weight: all said, in one go."""
    work = eggroll.work
    before = (base / "config.json").read_bytes()
    with (work / "prompts.txt").open("a") as file:
        file.write("One more?\n")
    (work / "held.txt").write_text("What is blue?\nName a bee.\n")
    (work / "helper.py").write_text("def total(text):\n    return float(sum(map(ord, text)) % 97)\n")
    weights = load_file(work / "tiny/model.safetensors")
    name = next(name for name in weights if "norm" in name)
    weights[name].view(-1)[0] += 2**-10
    save_file(weights, work / "tiny/model.safetensors", metadata={"format": "pt"})
    error = refused(eggroll("tune", "--resume", "base", "-g", "3"))
    head, *changes, way, _ = error.split("\n")
    assert head == "error: what the run in base reads has changed since it began:"
    assert [change.split(": ")[0] for change in changes] == [
        "  - data fingerprint", "  - heldout data fingerprint", "  - model fingerprint", "  - reward source",
    ]  # fmt: skip
    assert ": 6 rows, " in changes[0]
    assert " in the run, 7 rows, " in changes[0]
    assert way == (
        "Put it back as it was, or start a new run in another directory (-o). To go on all the same, add "
        "--accept-changes; environment.json will say what had changed"
    )
    assert (base / "config.json").read_bytes() == before
    done = eggroll("tune", "--resume", "base", "-g", "3", "--accept-changes")
    assert done.status == 0, done.err
    noted = RunDir.open("base").environment["resumed"][-1]["accepted_changes"]
    assert noted == [change.removeprefix("  - ") for change in changes]
    assert "accept_changes" not in RunDir.open("base").config["options"]
