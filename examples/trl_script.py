"""A GRPO script for TRL, moved over: the same data set and the same reward functions, two names changed.

    python examples/trl_script.py     two minutes on two cores

    from trl import GRPOConfig, GRPOTrainer        ->  from eggroll import EggrollConfig, EggrollTrainer
    GRPOTrainer(model=, reward_funcs=, args=, train_dataset=)  ->  EggrollTrainer(model, config, rewards, tokenizer)
    trainer.train()                                ->  trainer.evolve(dataset)

There is no reference model, no KL term and no backward pass. A group of completions of one prompt becomes a population
of models that answer the same prompts.
"""

from types import SimpleNamespace

from datasets import Dataset

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import load

TRAIN = {
    "What is rain?": "water",
    "What do bees eat?": "nectar",
    "How do planes fly?": "wing",
    "What is a hammer?": "tool",
}
HELDOUT = {"What is snow?": "ice", "What do cows eat?": "grass", "How do birds fly?": "wing", "What is a saw?": "tool"}


def dataset(questions: dict[str, str]) -> Dataset:
    """Conversational prompts and a column for the reward, as a GRPO script has them."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return Dataset.from_dict({"prompt": prompts, "word": list(questions.values())})


def names_the_word(completions, word, **kwargs):
    """1 where the answer contains the word."""
    return [float(gold in completion[0]["content"].lower()) for completion, gold in zip(completions, word, strict=True)]


def is_short(completions, **kwargs):
    """1 for at most six words, 1/6 less for each word more."""
    return [1 - max(0, len(completion[0]["content"].split()) - 6) / 6 for completion in completions]


def ends(completions, log_metric=None, **kwargs):
    """1/2 where the answer ends with a full stop."""
    scores = [0.5 * completion[0]["content"].strip().endswith(".") for completion in completions]
    if log_metric is not None:
        log_metric("full_stops", sum(scores) / len(scores))
    return scores


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the sum of the rewards on held-out questions, before and after; at most 2.5."""
    loaded = load(model, dtype="float32")
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.004, generations=generations,
        prompts_per_generation=len(TRAIN), max_tokens=18, eval_every=5,
    )  # fmt: skip
    trainer = EggrollTrainer(loaded.model, config, [names_the_word, is_short, ends], loaded.tokenizer)
    curve: list[float] = []  # held-out rewards: before, every five generations, after
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    trainer.evolve(dataset(TRAIN), eval_data=dataset(HELDOUT), listeners=[watch])
    print(f"reward on held-out questions: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
