"""``eggroll tune --judge-url``: a judge alone and beside another reward, one that fails, and a run that goes on."""

import json
import shutil

import pytest
from judge_server import answer_of, by_length, judging

KEY = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EGGROLL_JUDGE_KEY", KEY)


TUNE = ["tune", "tiny", "--prompts", "prompts.txt", "-p", "4", "--rank", "1", "--max-tokens", "4", "--batch-size", "2"]
TUNE += ["--dtype", "float32", "--sigma", "0.05", "--lr", "0.02", "--report-to", "none", "--judge-model", "small"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_graded_and_its_grades_are_kept(eggroll):
    (eggroll.work / "criteria.txt").write_text("It rhymes.")
    with judging() as server:
        arguments = [
            "--judge-url",
            server.url,
            "--judge-prompt",
            "criteria.txt",
            "--eval-prompts",
            "held.txt",
            "-g",
            "2",
        ]
        done = eggroll(*TUNE, *arguments, "-o", "run")
        assert done.status == 0, done.err
        assert "judge: small at 127.0.0.1" in " ".join(done.out.split())
        asked = len(server.requests)
        assert "It rhymes." in server.requests[0]["messages"][0]["content"]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        again = eggroll(*TUNE, *arguments, "-o", "again")
        assert again.status == 0
        assert len(server.requests) == asked  # all from the cache
    first, second = (lines(eggroll.work / name / "updates.jsonl") for name in ("run", "again"))
    assert first == second
    metrics = lines(eggroll.work / "run/metrics.jsonl")
    assert metrics[1]["unscored_share"] == metrics[1]["rewards/judge_failed"] == 0.0
    assert 0 <= metrics[1]["fitness_mean"] <= 1
    rows = lines(eggroll.work / "run/samples.jsonl")
    assert all("its length" in row["logged"]["judge said"] for row in rows if row["split"] == "train")
    written = [path for path in (eggroll.work / "run").rglob("*") if path.is_file()]
    assert not [path.name for path in written if KEY.encode() in path.read_bytes()]


def test_a_judge_beside_another_reward(eggroll):
    with judging(lambda body: "10") as server:
        done = eggroll(*TUNE, "--judge-url", server.url, "--judge-weight", "0.5", "-r", "lambda text: 2.0", "-g", "1",
                       "-o", "run")  # fmt: skip
    assert done.status == 0, done.err
    assert lines(eggroll.work / "run/metrics.jsonl")[-1]["fitness_mean"] == 2.5


def test_some_failures_are_counted_and_many_end_the_run_which_goes_on(eggroll):
    """Every answer of odd length has no grade, at first."""
    mended = False

    def behave(body):
        odd = sum(answer_of(body).encode()) % 8 == 0
        return "no idea" if odd and not mended else by_length(body)

    def broken(body):
        return 503, {"Retry-After": "0"}, b"down"

    with judging(behave) as server:
        whole = eggroll(*TUNE, "--judge-url", server.url, "-g", "3", "--judge-failures", "0.9", "-o", "whole")
        assert whole.status == 0, whole.err
        shares = [line["unscored_share"] for line in lines(eggroll.work / "whole/metrics.jsonl")]
        assert any(shares)
        assert "% of the answers could not be scored" in " ".join(whole.out.split())
        mended = True
        started = eggroll(*TUNE, "--judge-url", server.url, "-g", "1", "-o", "run")
        assert started.status == 0, started.err
        shutil.rmtree(eggroll.work / "cache")
        server.behave = broken
        ended = eggroll("tune", "tiny", "--resume", "run", "-g", "2", "--judge-timeout", "1")
        assert ended.status == 1
        said = " ".join((ended.out + ended.err).split())
        assert (
            "8 of 8 answers of the generation could not be scored by 'judge', more than the 20% that are allowed"
            in said
        )
        assert "status 503 (down), after 6 tries" in said
        assert len(lines(eggroll.work / "run/updates.jsonl")) == 1
        server.behave = by_length
        gone_on = eggroll("tune", "tiny", "--resume", "run", "-g", "2")
        assert gone_on.status == 0, gone_on.err
        straight = eggroll(*TUNE, "--judge-url", server.url, "-g", "2", "-o", "straight")
        assert straight.status == 0
    assert lines(eggroll.work / "run/updates.jsonl") == lines(eggroll.work / "straight/updates.jsonl")


def test_a_judge_may_move_but_not_go_or_be_another(eggroll):
    with judging() as server, judging() as moved:
        assert eggroll(*TUNE, "--judge-url", server.url, "-g", "1", "-o", "run").status == 0
        done = eggroll("tune", "tiny", "--resume", "run", "-g", "2", "--judge-url", moved.url)
        assert done.status == 0, done.err
        assert moved.requests
        other = eggroll("tune", "tiny", "--resume", "run", "-g", "3", "--judge-model", "larger")
        assert other.status == 1
        assert "judge-model" in other.err + other.out
        # A run's directory from elsewhere has no valid seal: it does not say whom answers and keys are sent to.
        environment = json.loads((eggroll.work / "run/environment.json").read_text())
        environment.pop("code_seal")
        (eggroll.work / "run/environment.json").write_text(json.dumps(environment))
        strange = eggroll("tune", "tiny", "--resume", "run", "-g", "3")
        assert strange.status == 1
        assert f"--judge-url {moved.url}" in " ".join((strange.out + strange.err).split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge-model", "m"], "--judge-model without --judge-url http://host:port/v1"),
        (["--judge-url", "http://host/v1"], "--judge-url needs --judge-model"),
        (["--judge-url", "host", "--judge-model", "m"], "must be the http(s) address"),
        (["--judge-url", "http://host/v1", "--judge-model", "m", "--judge-weight", "0"], "judge_weight (=0.0) must be"),
        (["--judge-url", "http://host/v1", "--judge-model", "m", "--judge-scale", "5", "1"], "low (=5.0) must be less"),
        (["--judge-url", "http://h/v1", "--judge-model", "m", "--judge-prompt", "no"], "criteria no cannot be read"),
        (["--judge-url", "http://h/v1", "--judge-model", "m", "--judge-reference", "gold"], "the column 'gold'"),
    ],
)
def test_bad_input(eggroll, arguments, words):
    done = eggroll("tune", "tiny", "--prompts", "prompts.txt", *arguments)
    assert done.status == 1
    assert words in " ".join((done.out + done.err).split())
    assert not (eggroll.work / "runs").exists()
