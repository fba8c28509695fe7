"""Runs: that they learn, are the same everywhere, go on where they were, and are refused where they cannot."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eggroll.errors import ConfigError, DataError, RunError
from eggroll.pretrain import measure, trainer
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import load_corpus
from eggroll.pretrain.engines import choose
from eggroll.pretrain.model import oracle
from eggroll.pretrain.model.shape import ModelShape
from eggroll.run.run_dir import RunDir


@pytest.fixture
def options(text_file, tmp_path):
    return PretrainOptions(
        data=str(text_file), hidden=16, n_layers=1, pop_size=64, generations=6, tokens=6, context=3, eval_every=2,
        checkpoint_every=2, sample_every=2, sample_length=5, momentum_shift=2, output=str(tmp_path / "run"),
        noise_table_size=1 << 16,
    )  # fmt: skip


def params_of(learner):
    return learner.engine.params


def equal(first, second):
    return all(np.array_equal(params_of(first)[name], params_of(second)[name]) for name in params_of(first))


def equal_tensors(first, second):
    tensors = first.state_tensors()
    return all(torch.equal(value, tensors[name]) for name, value in second.state_tensors().items())


def test_a_tiny_model_falls_below_the_unigram_entropy(text_file, tmp_path):
    settings = PretrainOptions(
        data=str(text_file), hidden=16, n_layers=1, pop_size=512, generations=60, tokens=8, context=4, eval_every=60,
        alpha_decay=0.05, momentum_shift=1, output=str(tmp_path / "run"), noise_table_size=1 << 18, sample_every=0,
    )  # fmt: skip
    before = trainer.train(dataclasses.replace(settings, generations=0, output=str(tmp_path / "start"))).result
    result = trainer.run(settings)
    assert result["unigram_bits_per_byte"] > 3
    assert before["validation_bits_per_byte"] > 7
    assert result["validation_bits_per_byte"] < result["unigram_bits_per_byte"] - 0.5


def test_a_run_leaves_what_it_promises(options):
    done = trainer.train(options)
    run = RunDir.open(options.output)
    assert json.loads((run.path / "result.json").read_text()) == done.result
    assert done.result["generations"] == 6
    assert done.result["member_tokens"] == 6 * 64 * 6
    lines = [line for line in run.metrics() if "evaluate_s" in line]
    assert len(lines) == 6
    assert all(0 <= line["ties"] <= 1 and line["tokens_per_s"] > 0 for line in lines)
    assert -9 < lines[0]["fitness_mean"] < -7  # bits per byte, the larger the better
    assert [line["generation"] for line in run.metrics() if "validation_bits_per_byte" in line] == [0, 2, 4, 6]
    record = run.updates()[3]
    assert record.lr == pytest.approx(1 / 1.045)
    assert record.sigma == 1 / 16
    assert len(record.shaped_fitness) == 32  # a number per pair
    assert set(record.shaped_fitness) <= {-1.0, 0.0, 1.0}
    assert all(len(row["completion"]) <= 5 for row in run.samples())
    assert len(run.samples()) >= 3


def test_results_do_not_depend_on_the_engine(options, tmp_path):
    first = trainer.train(options)
    others = [dict(backend="torch"), dict(threads=1, members_per_forward=6)]
    for number, changes in enumerate(others):
        settings = dataclasses.replace(options, output=str(tmp_path / f"other{number}"), **changes)
        assert equal(trainer.train(settings).learner, first.learner)


@pytest.mark.parametrize("changes", [{}, {"noise": "counter", "rank": 2}, {"fitness": "normalized", "group_size": 4}])
def test_a_resumed_run_ends_the_same(options, tmp_path, changes):
    options = dataclasses.replace(options, **changes)
    whole = trainer.train(options)
    part = dataclasses.replace(options, generations=3, output=str(tmp_path / "part"))
    trainer.train(part)
    resumed = dataclasses.replace(trainer.options_of_run(part.output), resume=part.output, generations=6)
    again = trainer.train(resumed)
    assert equal(again.learner, whole.learner)
    assert again.generation == 6
    momentum = [learner.engine.momentum for learner in (again.learner, whole.learner)]
    assert all(np.array_equal(momentum[0][name], momentum[1][name]) for name in momentum[1])
    assert RunDir.open(part.output).updates() == RunDir.open(options.output).updates()


def test_every_generation_can_be_replayed(options):
    whole = trainer.train(options)
    assert equal(trainer.model_of_run(options.output), whole.learner)
    run = RunDir.open(options.output)
    rebuilt = trainer.IntegerLearner(options, None)
    for record in run.updates():
        rebuilt.apply(record)
    assert equal(rebuilt, whole.learner)
    third = trainer.model_of_run(options.output, generation=3)
    assert not equal(third, whole.learner)
    with pytest.raises(RunError, match="holds 6 finished generations"):
        trainer.model_of_run(options.output, generation=7)


def test_members_of_a_group_read_the_same_window(options):
    """A population whose groups are the whole of it, scored by the oracle."""
    settings = dataclasses.replace(options, group_size=64, context=4, pop_size=64)
    corpus = load_corpus(settings.data)
    learner = trainer.IntegerLearner(settings, corpus)
    scores = learner._scores(2, np.arange(64))
    start = trainer_window(corpus, settings, 2)
    window = corpus.train[start : start + 11]
    _, state = oracle.forward(params_of(learner), window[:4])
    noise, shape = learner.engine.noise, learner.engine.shape
    for member in (0, 7, 63):
        drawn = {p.name: noise.draw(p, 2, [member // 2])[0] for p in shape.parameters}
        draws = oracle.member_draws(shape.parameters, 1, drawn, 1 - 2 * (member % 2))
        shift = oracle.noise_shift(1, 4)
        assert oracle.fitness(params_of(learner), window[4:], state, draws=draws, shift=shift) == scores[member]


def trainer_window(corpus, settings, generation):
    from eggroll.pretrain.data import window_starts

    return int(window_starts(corpus.train, 1, 11, seed=settings.seed, generation=generation)[0])


def test_what_cannot_be_resumed(options, text_file, tmp_path):
    trainer.train(options)
    again = dataclasses.replace(options, resume=options.output)
    with pytest.raises(RunError, match=r"hidden: 16 in the run, 4 now"):
        trainer.train(dataclasses.replace(again, hidden=4))
    with pytest.raises(ConfigError, match="6 finished generations already"):
        trainer.train(dataclasses.replace(again, generations=5))
    text_file.write_bytes(b"something else altogether. " * 200)
    with pytest.raises(RunError, match="data_fingerprint"):
        trainer.train(again)
    RunDir.create(tmp_path / "other", {"kind": "rl"})
    with pytest.raises(RunError, match="no run of eggroll pretrain"):
        trainer.options_of_run(str(tmp_path / "other"))


def test_a_checkpoint_of_another_shape_is_refused(options):
    learner = trainer.IntegerLearner(options, None)
    other = trainer.IntegerLearner(dataclasses.replace(options, hidden=4), None)
    with pytest.raises(RunError, match=r"another shape: emb \(256, 4\) instead of \(256, 16\)"):
        learner.load_state_tensors(other.state_tensors())


def test_text_shorter_than_the_context(options):
    with pytest.raises(DataError, match="fewer than one window of 1007"):
        trainer.train(dataclasses.replace(options, context=1000))


def test_all_problems_of_the_settings_at_once():
    with pytest.raises(ConfigError) as error:
        PretrainOptions(pop_size=7, group_size=3, alpha=1.5, sigma_shift=13, noise_table_size=100, minutes=-1,
                        alpha_final=1e-12, threads=0, members_per_forward=-2, backend="c", device="cuda")  # fmt: skip
    message = str(error.value)
    for part in (
        "pop_size (=7) must be even: members come in pairs; use 8",
        "group_size (=3) must be even and divide pop_size (=7)",
        "alpha (=1.5) is a share of the weights; it must be at most 1",
        "sigma_shift (=13) must be at most 12",
        "noise_table_size (=100) is smaller than the largest draw",
        "minutes (=-1) must be above 0",
        "alpha_final (=1e-12) must be at least 1e-09",
        "threads (=0) must be at least 1",
        "members_per_forward (=-2) must be at least 1",
        "backend='c' runs on the CPU, not on device='cuda'; use backend='torch'",
    ):
        assert part in message
    with pytest.raises(ConfigError, match=r"precision \(='fp32'\) has Adam .*: alpha, momentum_shift would do nothing"):
        PretrainOptions(precision="fp32", alpha=0.5, momentum_shift=2)
    with pytest.raises(ConfigError, match=r"hidden .* must be 1 to 16384"):
        PretrainOptions(hidden=20000)
    with pytest.raises(ConfigError, match=r"rank .* must be a whole number of at least 1"):
        PretrainOptions(rank=0)


def test_bits_per_byte_are_those_of_the_logits():
    shape = ModelShape(256, 16, 1)
    made = choose.make_engine(oracle.init_params(shape))
    stream = np.random.default_rng(0).integers(0, 256, 2500).astype(np.uint8)
    found, count = measure.bits_per_byte(made, stream)
    total = 0.0
    for start in (0, 1024, 2048):
        lane = stream[start : start + 1025]
        powers = 2.0 ** (oracle.forward(made.params, lane[:-1])[0].astype(float) / 16)
        total -= np.log2(powers[np.arange(len(powers)), lane[1:]] / powers.sum(axis=1)).sum()
    assert count == 2499
    assert found == pytest.approx(total / 2499, abs=1e-9)
    assert measure.bits_per_byte(made, stream, 1024)[1] == 1024
    assert measure.bits_per_byte(made, stream[:9])[1] == 8


def test_tables_of_counts():
    train = np.frombuffer(b"ab" * 500, np.uint8)
    found = measure.table_bits(train, train[:101])
    assert found["unigram_bits_per_byte"] == pytest.approx(np.log2(1256 / 501))
    assert found["order_1_bits_per_byte"] == pytest.approx(np.log2(756 / 501), abs=0.002)


def test_samples_are_reproducible_and_follow_the_logits(backend):
    made = choose.make_engine(oracle.init_params(ModelShape(256, 16, 1)), backend=backend)
    first = measure.sample(made, b"abc", 20, seed=1)
    assert first == measure.sample(made, b"abc", 20, seed=1)
    assert first != measure.sample(made, b"abc", 20, seed=2)
    greedy = measure.sample(made, b"abc", 4, temperature=0)
    read = np.frombuffer(b"\0abc" + greedy, np.uint8)
    logits, _ = oracle.forward(made.params, read[:-1])
    assert bytes(logits[3:].argmax(axis=1).astype(np.uint8)) == greedy
    counts = np.bincount(
        [measure.sample(made, b"abc", 1, temperature=2, seed=seed)[0] for seed in range(300)], minlength=256
    )
    weights = 2.0 ** (logits[3].astype(float) / 32)
    likely = weights / weights.sum() > 0.02
    assert abs(counts[likely].sum() / 300 - weights[likely].sum() / weights.sum()) < 0.1


@pytest.mark.parametrize("device", ["gpu0", "cuda:99"])
def test_a_device_that_is_not_there_leaves_no_run_and_spoils_none(options, device):
    with pytest.raises(ConfigError, match=f"device .='{device}'"):
        trainer.train(dataclasses.replace(options, device=device))
    assert not Path(options.output).exists()
    trainer.train(dataclasses.replace(options, generations=2))
    again = dataclasses.replace(options, resume=options.output, device=device)
    with pytest.raises(ConfigError, match=f"device .='{device}'"):
        trainer.train(again)
    run = RunDir.open(options.output)
    assert run.config["device"] == "auto"
    run.update_config({**run.config, "device": "cuda:7", "threads": 64})  # made on another machine
    assert trainer.sample_run(options.output, "abc", 4) == trainer.sample_run(options.output, "abc", 4, threads=1)


def test_a_run_from_before_an_option_goes_on(options):
    trainer.train(dataclasses.replace(options, generations=2))
    run = RunDir.open(options.output)
    run.update_config({name: value for name, value in run.config.items() if name != "text_column"})
    resumed = dataclasses.replace(trainer.options_of_run(options.output), resume=options.output, generations=4)
    assert trainer.train(resumed).generation == 4


def test_a_run_can_be_sampled(options):
    trainer.train(options)
    text = trainer.sample_run(options.output, "abc", 12, seed=3)
    assert text == trainer.sample_run(options.output, "abc", 12, seed=3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_floating_point_trains_the_same_network(options, tmp_path, precision):
    settings = dataclasses.replace(options, precision=precision, pop_size=32, generations=4, momentum_shift=0)
    whole = trainer.train(settings)
    assert 4 < whole.result["validation_bits_per_byte"] < 10
    part = dataclasses.replace(settings, generations=4, output=str(tmp_path / "part"))
    learner = trainer.make_learner(part, None)
    for record in whole.run.updates():
        learner.apply(record)
    assert equal_tensors(learner, whole.learner)
    assert equal_tensors(trainer.model_of_run(settings.output), whole.learner)
    longer = dataclasses.replace(trainer.options_of_run(settings.output), resume=settings.output, generations=8)
    with pytest.raises(RunError, match="generations: 4 in the run, 8 now"):  # the cosine ends with the last one
        trainer.train(longer)
    assert len(learner.sample(b"abc", 5)) == 5
    assert learner.sample(b"abc", 5, temperature=0) == learner.sample(b"abc", 5, temperature=0)


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
