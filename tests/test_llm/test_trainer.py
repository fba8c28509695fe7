"""The trainer on tiny models: it learns, in every form of data and reward, and leaves the center alone."""

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

from eggroll import (
    CustomReward,
    EggrollConfig,
    EggrollTrainer,
    FunctionReward,
    MultiReward,
    PerplexityReward,
    TextReward,
)
from eggroll.core.oracle import member_params
from eggroll.errors import ConfigError, DataError, RewardError, RunError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.generation import generate as decoding
from eggroll.llm.rewards import Reward
from eggroll.run.run_dir import RunDir

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three.", "Who?"]
HELDOUT = ["What is blue?", "Name a bird.", "Why?"]
TEXTS = [f"the cat sat on mat {number}" for number in range(10, 18)]


def letters(text):
    """The part of six characters that are small letters."""
    return sum("a" <= character <= "z" for character in text) / 6


def checksum(text):
    """A score that any other text changes."""
    return float(sum(position * ord(character) for position, character in enumerate(text, start=1)) % 1009)


def config(**settings):
    small = {"population_size": 6, "rank": 1, "sigma": 0.05, "lr": 0.1, "generations": 2, "max_tokens": 6}
    return EggrollConfig(**{**small, "prompts_per_generation": 3, "samples_per_generation": 2, **settings})


def center(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def unchanged(model, before):
    return all(parameter.equal(before[name]) for name, parameter in model.named_parameters())


def scores_of(trainer, data, generation=0):
    """The table of raw scores of one generation."""
    trainer.worker.evaluator.choose_mode(load_examples(data))
    return trainer.worker.evaluator.evaluate(generation, trainer.config.sigma, load_examples(data)).fitness


def test_it_learns_from_generated_text(tiny_model, tiny_tokenizer):
    """Small letters instead of random bytes: from 0.08 to 0.99 with each of three seeds, on prompts never seen too."""
    settings = config(
        population_size=32, sigma=0.1, lr=0.05, optimizer="adam", head=True, generations=60, eval_every=20
    )
    trainer = EggrollTrainer(tiny_model, settings, TextReward(tiny_tokenizer, letters), tiny_tokenizer)
    history = trainer.evolve(PROMPTS, eval_data=HELDOUT)
    fitness = [line["fitness_mean"] for line in history]
    assert np.mean(fitness[:5]) < 0.2
    assert np.mean(fitness[-5:]) > 0.8
    assert history[-1]["heldout_reward"] > 0.8


def test_it_learns_the_likelihood_of_texts(tiny_model, tiny_tokenizer):
    settings = config(population_size=32, rank=4, sigma=0.02, optimizer="adam", lr=0.02, generations=40)
    trainer = EggrollTrainer(tiny_model, settings, PerplexityReward(tiny_tokenizer), tiny_tokenizer)
    history = trainer.evolve(TEXTS, eval_data=TEXTS)
    assert history[-1]["heldout_reward"] > history[0]["fitness_mean"] + 1.0


class FailsOnce(Reward):
    """A reward class of the user's own, whose third call leaves the program."""

    name = "fails once"

    def __init__(self, error):
        self.calls, self.error = 0, error

    def score(self, prompts, completions, columns=None):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return [checksum(text) for text in completions]


@pytest.mark.parametrize("error", [SystemExit(), ValueError("server gone")], ids=["exit", "raise"])
def test_after_a_reward_has_failed_the_trainer_goes_on_where_it_is(build_model, tiny_tokenizer, tmp_path, error):
    settings = config(generations=4, members_per_forward=6)
    whole = EggrollTrainer(build_model("llama"), settings, checksum, tiny_tokenizer)
    whole.evolve(PROMPTS)
    trainer = EggrollTrainer(build_model("llama"), settings, FailsOnce(error), tiny_tokenizer)
    run = RunDir.create(tmp_path / "run", settings.to_dict())
    with pytest.raises(RewardError, match=r"reward 'fails once' (ended the program|raised ValueError: server gone)"):
        trainer.evolve(PROMPTS, run=run)
    assert (trainer.done, len(trainer.history), run.latest_checkpoint().generation) == (2, 2, 2)
    trainer.evolve(PROMPTS, run=run)
    assert trainer.done == 4
    assert unchanged(trainer.model, center(whole.model))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_results_do_not_depend_on_members_per_forward(build_model, tiny_tokenizer, temperature):
    """Members in chunks of 1, 2, 4 or all: the same texts, so the same scores and the same run."""
    runs = []
    for members_per_forward in (None, 1, 2, 4):
        model = build_model("llama")
        settings = config(members_per_forward=members_per_forward, temperature=temperature, generations=3)
        trainer = EggrollTrainer(model, settings, checksum, tiny_tokenizer)
        history = trainer.evolve(PROMPTS)
        runs.append(([line["fitness_mean"] for line in history], center(model)))
    for fitness, weights in runs[1:]:
        assert fitness == runs[0][0]
        for name, parameter in weights.items():
            torch.testing.assert_close(parameter, runs[0][1][name], rtol=1e-6, atol=1e-6)


def test_likelihoods_do_not_depend_on_members_per_forward(build_model, tiny_tokenizer):
    tables = []
    for members_per_forward in (None, 1, 4):
        settings = config(members_per_forward=members_per_forward)
        trainer = EggrollTrainer(build_model("llama"), settings, PerplexityReward(tiny_tokenizer), tiny_tokenizer)
        tables.append(scores_of(trainer, TEXTS))
    assert tables[0].shape == (6, 8)
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], rtol=1e-5)


def test_sampling_is_by_address(build_model, tiny_tokenizer):
    def texts(seed, temperature=1.0):
        seen = []
        reward = FunctionReward(lambda prompts, completions: seen.append(list(completions)) or [0.0] * len(completions))
        trainer = EggrollTrainer(
            build_model("llama"), config(seed=seed, temperature=temperature), reward, tiny_tokenizer
        )
        trainer.worker.evaluator.choose_mode(load_examples(PROMPTS))
        for generation in (0, 1):
            trainer.worker.evaluator.evaluate(generation, 1e-8, load_examples(["Say hi."] * 3))
        return seen

    first = texts(0)
    assert texts(0) == first
    assert texts(1) != first
    assert first[0] != first[1]  # generations draw anew
    assert len(set(first[0])) > 12  # so do members and rows, though their prompts and almost their weights are the same
    assert len(set(texts(0, 0.0)[0])) == 1


OWN = ["What is red?", "Hi", "Count to three, slowly."]
ALIKE = [f"The same twenty-odd bytes, then {rest}" for rest in ("red", "a colour that is not red", "9")]


@pytest.mark.parametrize(
    ("name", "prompts", "shares"),
    [(name, OWN, False) for name in ("llama", "gpt2", "gemma2", "mixtral", "mamba", "t5")]
    + [(name, ALIKE, name in ("llama", "gpt2", "mixtral")) for name in ("llama", "gpt2", "gemma2", "mixtral", "mamba")],
)
def test_each_members_text_is_what_generate_gives(build_model, tiny_tokenizer, monkeypatch, name, prompts, shares):
    """Rows that end early are dropped on the way, and what prompts share is computed once where the cache allows it;
    the text equals that of the member's own weights."""
    spreads = []
    spread = decoding.spread
    monkeypatch.setattr(decoding, "spread", lambda *given: spreads.append(given) or spread(*given))
    seen = []
    reward = FunctionReward(lambda prompts, completions: seen.extend(completions) or [0.0] * len(completions))
    model = build_model(name)
    settings = config(population_size=4, sigma=0.1, max_tokens=12, chat=False, embeddings=True)
    trainer = EggrollTrainer(model, settings, reward, tiny_tokenizer)
    # Every third token ends a text, so that rows end at all lengths.
    trainer.worker.evaluator.eos_ids = ends = list(range(0, 300, 3))
    scores_of(trainer, prompts, generation=1)
    assert len(seen) == 12
    assert len(spreads) == int(shares)
    encoded = tiny_tokenizer(prompts, return_tensors="pt", padding=True)
    weights = {key: parameter.detach().double().numpy() for key, parameter in model.named_parameters()}
    start = 1 if model.config.is_encoder_decoder else encoded.input_ids.shape[1]
    lengths = set()
    for member in range(4):
        own = member_params(weights, trainer.evolved, member, sigma=0.1, rank=1, seed=42, generation=1)
        twin = build_model(name)
        with torch.no_grad():
            for key, parameter in twin.named_parameters():
                parameter.copy_(torch.as_tensor(own[key]))
        out = twin.generate(
            **encoded, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=tiny_tokenizer.pad_token_id
        )
        for index, row in enumerate(out[:, start:].tolist()):
            kept = row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
            lengths.add(len(kept))
            assert seen[member * 3 + index] == tiny_tokenizer.decode(kept, skip_special_tokens=True)
    assert len(lengths) > 2


def test_the_center_shares_the_beginning_of_prompts_too(tiny_model, tiny_tokenizer, monkeypatch):
    settings = config(population_size=4, max_tokens=12, chat=False)
    trainer = EggrollTrainer(tiny_model, settings, lambda text: float(len(text)), tiny_tokenizer)
    shared = trainer.worker.evaluator.heldout(load_examples(ALIKE))
    monkeypatch.setattr(decoding, "common_prefix", lambda ids, mask: 0)
    alone = trainer.worker.evaluator.heldout(load_examples(ALIKE))
    assert [sample["completion"] for sample in shared.samples] == [sample["completion"] for sample in alone.samples]


class MixesRows(transformers.LlamaForCausalLM):
    """A model whose rows see each other."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + outputs.logits.mean(0, keepdim=True)
        return outputs


class Notes:
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)

    def generation(self, metrics):
        self.messages.append(metrics["generation"])


def test_a_model_without_rows_falls_back_and_says_so(build_model, tiny_tokenizer):
    model = build_model("llama")
    model.__class__ = MixesRows
    trainer = EggrollTrainer(model, config(generations=1), PerplexityReward(tiny_tokenizer), tiny_tokenizer)
    notes = Notes()
    trainer.evolve(TEXTS[:1], listeners=[notes])
    assert trainer.worker.learner.population.mode == "loop"
    assert notes.messages[0].startswith("members are evaluated one at a time, because: ")
    assert notes.messages[1:] == [1]
    plain = EggrollTrainer(
        build_model("llama"), config(generations=1), PerplexityReward(tiny_tokenizer), tiny_tokenizer
    )
    assert plain.worker.evaluator.choose_mode(load_examples(TEXTS)) == "rows"
    assert plain.worker.evaluator.note == ""


def test_the_one_at_a_time_scores_are_those_of_rows(build_model, tiny_tokenizer):
    tables = []
    for mode in ("rows", "loop"):
        reward = MultiReward([(PerplexityReward(tiny_tokenizer), 0.3), (TextReward(tiny_tokenizer, checksum), 0.7)])
        trainer = EggrollTrainer(build_model("llama"), config(), reward, tiny_tokenizer)
        trainer.worker.learner.population.mode = mode
        tables.append(scores_of(trainer, PROMPTS))
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-5)


def test_custom_rewards_get_the_member_itself(build_model, tiny_tokenizer):
    """The function sees the weights of one member after the other, as materialized, and labeled inputs."""
    seen = []

    def reward_fn(model, inputs):
        seen.append(float(model.model.layers[0].self_attn.q_proj(torch.eye(32)).sum()))
        assert sorted(inputs) == ["attention_mask", "input_ids", "labels"]
        return -float(model(**inputs).loss)

    model = build_model("llama")
    before = center(model)
    trainer = EggrollTrainer(model, config(), CustomReward(reward_fn), tiny_tokenizer)
    table = scores_of(trainer, TEXTS)
    assert table.shape == (6, 1)
    assert unchanged(model, before)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = {key: parameter.double().numpy() for key, parameter in before.items()}
    for member in range(6):
        own = member_params(weights, trainer.evolved, member, sigma=0.05, rank=1, seed=42, generation=0)
        assert seen[member] == pytest.approx(own[name].sum(), rel=1e-4)


def test_mixtures_are_weighted_sums(build_model, tiny_tokenizer):
    text, tokens = TextReward(tiny_tokenizer, checksum), PerplexityReward(tiny_tokenizer)
    custom = CustomReward(lambda model, inputs: float(model(**inputs).logits.std()))

    def table(reward):
        trainer = EggrollTrainer(build_model("llama"), config(), reward, tiny_tokenizer)
        trainer.worker.learner.population.mode = "loop"
        return scores_of(trainer, PROMPTS)

    mixed = table(MultiReward([(text, 0.5), (tokens, 2.0), (custom, -1.0)]))
    np.testing.assert_allclose(mixed, 0.5 * table(text) + 2.0 * table(tokens) - table(custom), rtol=1e-6)


def test_trl_rewards_with_columns_and_conversations(build_model, tiny_tokenizer):
    rows = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n} + 1?"}],
            "answer": str(n + 1),
        }
        for n in range(4)
    ]
    calls = []

    def close(prompts, completions, answer, **columns):
        calls.append((prompts, completions, answer, columns))
        return [float(len(text[0]["content"])) for text in completions]

    def second(completions, **columns):
        return [0.5] * len(completions)

    trainer = EggrollTrainer(build_model("llama"), config(), [close, second], tiny_tokenizer)
    history = trainer.evolve(rows)
    assert len(history) == 2
    prompts, completions, answer, _ = calls[0]
    assert len(prompts) == len(completions) == len(answer) == 6 * 3
    assert prompts[0][0] == {"role": "system", "content": "Be brief."}
    assert completions[0][0]["role"] == "assistant"
    assert [f"{int(a) - 1} + 1?" for a in answer] == [prompt[1]["content"] for prompt in prompts]
    lengths = [len(text[0]["content"]) + 0.5 for text in completions]
    assert history[0]["fitness_mean"] == pytest.approx(np.mean(lengths))


def test_data_loaders(build_model, tiny_tokenizer):
    encoded = tiny_tokenizer(TEXTS, return_tensors="pt", padding=True)
    ids, mask = encoded.input_ids, encoded.attention_mask
    loaders = {
        "mappings": DataLoader(
            [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)], batch_size=4
        ),
        "tuples": DataLoader(TensorDataset(ids, mask), batch_size=4),
        "tensors": DataLoader(ids, batch_size=4),
        "a list": [
            {"input_ids": ids[:4], "attention_mask": mask[:4]},
            {"input_ids": ids[4:], "attention_mask": mask[4:]},
        ],
    }
    results = []
    for loader in loaders.values():
        trainer = EggrollTrainer(build_model("llama"), config(), PerplexityReward(tiny_tokenizer), tiny_tokenizer)
        history = trainer.evolve(loader, eval_data=loader)
        results.append([line["fitness_mean"] for line in history] + [history[-1]["heldout_reward"]])
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)
    trainer = EggrollTrainer(build_model("llama"), config(), TextReward(tiny_tokenizer, letters), tiny_tokenizer)
    assert len(trainer.evolve(loaders["mappings"])) == 2


def test_data_that_cannot_be_used(tiny_model, tiny_tokenizer):
    trainer = EggrollTrainer(tiny_model, config(), letters, tiny_tokenizer)
    with pytest.raises(DataError, match=r"the data set is empty: it has no row with any text"):
        trainer.evolve([])
    with pytest.raises(DataError, match=r"the data loader yields no batch"):
        trainer.evolve(DataLoader([]))
    with pytest.raises(
        DataError, match=r"a batch must be a mapping with 'input_ids' or a tensor of token ids, got list"
    ):
        trainer.evolve(DataLoader(PROMPTS, batch_size=2))


@pytest.mark.parametrize("when", [0, 3, 5], ids=["at first", "in the middle", "at last"])
def test_the_center_survives_a_reward_that_raises(tiny_model, tiny_tokenizer, when):
    before, calls = center(tiny_model), []

    def reward(prompts, completions):
        calls.append(len(completions))
        if len(calls) > when:
            raise ValueError("no")
        return [float(len(text)) for text in completions]

    trainer = EggrollTrainer(tiny_model, config(members_per_forward=1), reward, tiny_tokenizer)
    with pytest.raises(RewardError, match=r"reward function 'reward' raised ValueError: no"):
        trainer.evolve(PROMPTS)
    assert unchanged(tiny_model, before)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in tiny_model.parameters())


def test_the_center_survives_evaluations_and_interrupts(tiny_model, tiny_tokenizer):
    before = center(tiny_model)
    trainer = EggrollTrainer(tiny_model, config(), letters, tiny_tokenizer)
    for generation in range(2):
        scores_of(trainer, PROMPTS, generation)
    assert unchanged(tiny_model, before)

    def interrupt(text):
        raise KeyboardInterrupt

    trainer = EggrollTrainer(tiny_model, config(), TextReward(tiny_tokenizer, interrupt), tiny_tokenizer)
    assert trainer.evolve(PROMPTS) == []
    assert trainer.interrupted
    assert unchanged(tiny_model, before)


def test_samples_and_metrics_of_a_run(tiny_model, tiny_tokenizer, tmp_path):
    run = RunDir.create(tmp_path / "run", {})
    trainer = EggrollTrainer(tiny_model, config(eval_every=1), TextReward(tiny_tokenizer, letters), tiny_tokenizer)
    history = trainer.evolve(PROMPTS, eval_data=HELDOUT, run=run)
    samples = run.samples()
    for generation in (0, 1, 2):
        held = [row for row in samples if row["generation"] == generation and row["split"] == "heldout"]
        assert [row["prompt"] for row in held] == HELDOUT
        assert {row["member"] for row in held} == {-1}
        scores = [row["reward"] for row in held]
        assert scores == [letters(row["completion"]) for row in held]
        logged = next(line for line in run.metrics() if line["generation"] == generation)
        assert logged["heldout_reward"] == pytest.approx(np.mean(scores))
    train = [row for row in samples if row["split"] == "train"]
    assert [(row["generation"], row["member"]) for row in train] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(row["prompt"] in PROMPTS for row in train)
    assert [line["generation"] for line in history] == [1, 2]
    assert history == run.metrics()[1:]
    assert run.latest_checkpoint().generation == 2


def test_a_callback_ends_the_run_and_evolve_goes_on(build_model, tiny_tokenizer):
    def trainer_of(model):
        return EggrollTrainer(model, config(generations=4, optimizer="adam"), checksum, tiny_tokenizer)

    whole, parts = build_model("llama"), build_model("llama")
    trainer_of(whole).evolve(PROMPTS)
    trainer = trainer_of(parts)
    seen = []
    history = trainer.evolve(PROMPTS, callback=lambda metrics: seen.append(metrics["generation"]) or len(seen) < 2)
    assert seen == [1, 2]
    assert trainer.done == 2
    assert len(history) == 2
    assert len(trainer.evolve(PROMPTS)) == 4
    assert [line["generation"] for line in trainer.history] == [1, 2, 3, 4]
    assert unchanged(whole, center(parts))
    with pytest.raises(ConfigError, match=r"all 4 generations of this trainer are done"):
        trainer.evolve(PROMPTS)


def test_checkpoints_go_on_bit_for_bit(build_model, tiny_tokenizer, tmp_path):
    whole, first, second = (build_model("llama") for _ in range(3))
    settings = config(generations=4, optimizer="adam")
    EggrollTrainer(whole, settings, checksum, tiny_tokenizer).evolve(PROMPTS)
    trainer = EggrollTrainer(first, settings, checksum, tiny_tokenizer)
    trainer.evolve(PROMPTS, callback=lambda metrics: metrics["generation"] < 2)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    trainer = EggrollTrainer(second, settings, checksum, tiny_tokenizer)
    assert trainer.load_checkpoint(tmp_path / "checkpoint") == 2
    assert unchanged(second, center(first))
    trainer.evolve(PROMPTS)
    assert trainer.done == 4
    assert unchanged(second, center(whole))
    trainer.save_checkpoint(tmp_path / "checkpoint")
    assert RunDir.open(tmp_path / "checkpoint").latest_checkpoint().generation == 4


def test_no_checkpoint(tiny_model, tiny_tokenizer, tmp_path):
    trainer = EggrollTrainer(tiny_model, config(), letters, tiny_tokenizer)
    with pytest.raises(RunError, match=r"nothing does not exist"):
        trainer.load_checkpoint(tmp_path / "nothing")
    RunDir.create(tmp_path / "run", {})
    with pytest.raises(RunError, match=r"run holds no checkpoint"):
        trainer.load_checkpoint(tmp_path / "run")


def test_saved_models_load_with_plain_transformers(build_model, tiny_tokenizer, tmp_path):
    model = build_model("gpt2")
    trainer = EggrollTrainer(model, config(lr=1.0), checksum, tiny_tokenizer)
    trainer.evolve(PROMPTS)
    saved = trainer.save(tmp_path / "evolved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert unchanged(loaded, center(model))
    assert unchanged(model, center(loaded))
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer("Hi").input_ids == tiny_tokenizer("Hi").input_ids


def test_which_parameters_are_evolved(build_model, tiny_tokenizer):
    def kinds(name, **settings):
        trainer = EggrollTrainer(build_model(name), config(**settings), letters, tiny_tokenizer)
        return {spec.name.rsplit(".", 2)[-2] for spec in trainer.evolved}

    matrices = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds("llama") == matrices
    assert kinds("llama", embeddings=True) == matrices | {"embed_tokens"}
    assert kinds("llama", head=True) == matrices | {"lm_head"}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert kinds("llama", vectors=True) == matrices | norms
    assert kinds("llama", target_modules=("q_proj", "lm_head")) == {"q_proj", "lm_head"}
    assert kinds("gpt2") == {"c_attn", "c_proj", "c_fc"}
    assert kinds("gpt2", target_modules=["c_attn"], exclude=["h.0"]) == {"c_attn"}


def test_a_tokenizer_without_a_pad_token(build_model, plain_tokenizer):
    trainer = EggrollTrainer(build_model("llama"), config(), letters, plain_tokenizer)
    assert len(trainer.evolve(PROMPTS)) == 2
