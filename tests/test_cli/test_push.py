"""A trained model goes to the hub, here a stand-in on this machine; what is missing is said before a run begins."""

import json

import pytest
from hub_server import TOKEN, serve
from huggingface_hub import constants

from eggroll.cli.tune import repository_name
from eggroll.errors import ModelError
from eggroll.llm import EggrollConfig, EggrollTrainer


@pytest.fixture
def hub(monkeypatch):
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_run_is_pushed(eggroll, hub):
    done = eggroll.tune("-g", "1", "-o", "short run", "--push-to-hub", "--hub-private")
    assert done.status == 0, done.err
    assert f"pushed   {hub.endpoint}/me/short-run" in done.out
    assert hub.repos == {"me/short-run": True}
    saved = eggroll.work / "short run/model"
    pushed = {path: content for (_, path), content in hub.files.items()}
    assert set(pushed) == {path.name for path in saved.iterdir()}
    assert pushed["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert 'from_pretrained("me/short-run")' in card
    assert "\n# short-run\n" in card
    assert "base_model: " not in card  # a directory is none for the hub


def test_a_push_that_fails_loses_nothing(eggroll, hub):
    hub.full = True
    done = eggroll.tune("-g", "1", "-o", "run", "--push-to-hub", "--hub-model-id", "team/short")
    assert done.status == 0, done.err
    assert "not pushed: the model could not be pushed to team/short" in done.out
    assert "Storage quota exceeded" in done.out
    assert "hf upload team/short run/model ." in done.out
    assert (eggroll.work / "run/report.html").exists()
    hub.full = False
    done = eggroll("tune", "--resume", "run")
    assert done.status == 0, done.err
    assert ("team/short", "model.safetensors") in hub.files


def test_a_run_of_someone_else_pushes_nothing(eggroll, hub, monkeypatch):
    assert eggroll.tune("-g", "1", "-o", "run", "--push-to-hub").status == 0
    hub.files.clear()
    environment = eggroll.work / "run/environment.json"
    facts = json.loads(environment.read_text())
    del facts["code_seal"]
    environment.write_text(json.dumps(facts))
    done = eggroll("tune", "--config", "run/config.json", "-r", "score.py", "-o", "other")
    assert "used --push-to-hub, which runs code or acts in your name" in done.err
    done = eggroll("tune", "--resume", "run", "-r", "score.py")
    assert "the run in run used --push-to-hub, which is not taken from a run's directory" in done.out + done.err
    assert not hub.files


REFUSED = [
    ({"HF_TOKEN": None}, (), "pushing to the Hugging Face hub needs a token that may write: "),
    ({"HF_TOKEN": "hf_other"}, (), "the hub does not take the token ("),
    ({}, ("--hub-model-id", "a/b/c"), "hub_model_id 'a/b/c' is not a name of the Hugging Face hub: "),
]


@pytest.mark.parametrize(("variables", "more", "said"), REFUSED, ids=["none", "wrong", "name"])
def test_what_is_missing_is_said_before_the_run(eggroll, hub, monkeypatch, variables, more, said):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(eggroll.work / "token"))
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    done = eggroll.tune("-g", "1", "-o", "run", "--push-to-hub", *more)
    assert done.status == 1
    assert said in done.err
    assert not (eggroll.work / "run").exists()


def test_a_token_that_may_only_read_and_no_network(eggroll, hub, monkeypatch):
    hub.role = "read"
    done = eggroll.tune("-g", "1", "-o", "run", "--push-to-hub")
    assert "the token for the Hugging Face hub may only read" in done.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = eggroll.tune("-g", "1", "-o", "run", "--push-to-hub")
    assert "nothing can be pushed to the hub while HF_HUB_OFFLINE is set" in done.err


def test_a_trainer_pushes(work, hub):
    config = EggrollConfig(population_size=4, rank=1, generations=1, max_tokens=4)
    trainer = EggrollTrainer.from_model_id("tiny", config, lambda text: float(len(text)), dtype="float32")
    assert trainer.push_to_hub("short", private=False) == f"{hub.endpoint}/me/short"
    assert json.loads(hub.files["me/short", "eggroll.json"])["base_model"] == "tiny"
    assert 'from_pretrained("me/short")' in hub.files["me/short", "README.md"].decode()
    hub.full = True
    with pytest.raises(ModelError, match=r"Storage quota exceeded.* Call it again, or save\(\) to a directory"):
        trainer.push_to_hub("short")


def test_names_of_repositories():
    assert [repository_name(name) for name in ("short run", "a--b..c", "..", "ä")] == [
        "short-run", "a-b-c", "eggroll-model", "eggroll-model",
    ]  # fmt: skip
