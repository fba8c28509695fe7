# ruff: noqa: W293, W291 (the snippets stand as they were written)
"""The recipes and the training template of the dict-based API as they stand in its documentation.

Only the import line and ``device="cuda"`` are changed. What a recipe takes for granted (data, sizes, ``env``,
``episode_returns``) is made here.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

IMPORTS = """
from eggroll.torch.functional import (
    EggrollConfig, get_weight_shapes, generate_perturbations,
    perturbed_forward, compute_gradients, update_params, normalize_fitnesses
)
from eggroll.torch.functional import perturbed_conv2d
"""
CARTPOLE = """
# ========== MODEL DEFINITION ==========
params = {
    'layer1.weight': torch.randn(256, 4, device="cuda") * 0.1,   # obs_dim -> hidden
    'layer2.weight': torch.randn(2, 256, device="cuda") * 0.1,  # hidden -> actions
}
shapes = get_weight_shapes(params)

# ========== FORWARD FUNCTIONS ==========
def forward_perturbed(obs, params, perts):
    \"\"\"Forward with ES perturbations. obs: (pop, batch, 4)\"\"\"
    h = torch.tanh(perturbed_forward(obs, params['layer1.weight'], None, perts, 'layer1.weight'))
    return perturbed_forward(h, params['layer2.weight'], None, perts, 'layer2.weight')

def forward_clean(obs, params):
    \"\"\"Clean forward for evaluation. obs: (batch, 4)\"\"\"
    h = torch.tanh(obs @ params['layer1.weight'].T)
    return h @ params['layer2.weight'].T

# ========== FITNESS FUNCTION (RL) ==========
def compute_fitness(logits, env):
    \"\"\"Run episodes, return total rewards per population member.\"\"\"
    actions = logits.argmax(dim=-1)
    # ... run env steps, accumulate rewards ...
    return episode_returns  # (population_size,)

# ========== TRAINING LOOP ==========
for epoch in range(max_epochs):
    perts = generate_perturbations(shapes, pop_size, rank, sigma, gen, dtype)
    
    # Collect trajectories
    obs = env.reset()
    obs_t = obs.unsqueeze(0).expand(pop_size, -1, -1)
    logits = forward_perturbed(obs_t, params, perts)
    
    # Compute fitness and update
    fitnesses = compute_fitness(logits, env)
    fitnesses = normalize_fitnesses(fitnesses)
    grads = compute_gradients(fitnesses, perts, pop_size)
    update_params(params, grads, lr)
"""
MNIST = """
# ========== MODEL DEFINITION ==========
params = {
    'layer1.weight': torch.randn(256, 784, device="cuda") * 0.1,
    'layer1.bias': torch.zeros(256, device="cuda"),
    'layer2.weight': torch.randn(10, 256, device="cuda") * 0.1,
    'layer2.bias': torch.zeros(10, device="cuda"),
}
shapes = get_weight_shapes(params)

# ========== FORWARD FUNCTIONS ==========
def forward_perturbed(x, params, perts):
    \"\"\"x: (pop, batch, 784) -> (pop, batch, 10)\"\"\"
    h = torch.tanh(perturbed_forward(x, params['layer1.weight'], 
                                     params['layer1.bias'], perts, 'layer1.weight'))
    return perturbed_forward(h, params['layer2.weight'], 
                             params['layer2.bias'], perts, 'layer2.weight')

def forward_clean(x, params):
    \"\"\"x: (batch, 784) -> (batch, 10)\"\"\"
    h = torch.tanh(x @ params['layer1.weight'].T + params['layer1.bias'])
    return h @ params['layer2.weight'].T + params['layer2.bias']

# ========== FITNESS FUNCTION (Classification) ==========
def compute_classification_fitness(logits, labels):
    \"\"\"Negative cross-entropy loss (higher = better).\"\"\"
    log_probs = torch.log_softmax(logits, dim=-1)
    labels_exp = labels.unsqueeze(0).expand(logits.shape[0], -1)
    nll = -torch.gather(log_probs, 2, labels_exp.unsqueeze(-1)).squeeze(-1)
    return -nll.mean(dim=-1)  # (population_size,)

# ========== TRAINING LOOP (Stochastic Sampling) ==========
for epoch in range(max_epochs):
    # Sample NEW mini-batch each epoch (crucial for SL generalization)
    idx = torch.randint(0, len(train_imgs), (batch_size,), device="cuda")
    batch_imgs = train_imgs[idx]
    batch_labels = train_labels[idx]
    
    perts = generate_perturbations(shapes, pop_size, rank, sigma, gen, dtype)
    
    # Expand batch for population: (batch, 784) -> (pop, batch, 784)
    x = batch_imgs.unsqueeze(0).expand(pop_size, -1, -1)
    logits = forward_perturbed(x, params, perts)
    
    fitnesses = compute_classification_fitness(logits, batch_labels)
    fitnesses = normalize_fitnesses(fitnesses)
    grads = compute_gradients(fitnesses, perts, pop_size)
    update_params(params, grads, lr)
    
    # Decay sigma for stability
    sigma *= sigma_decay
"""
MNIST_CNN = """
# ========== MODEL DEFINITION ==========
params = {
    'conv1.weight': torch.randn(16, 1, 3, 3, device="cuda") * 0.1,   # 1->16 channels, 3x3
    'conv2.weight': torch.randn(32, 16, 3, 3, device="cuda") * 0.1,  # 16->32 channels, 3x3
    'fc.weight': torch.randn(10, 32*7*7, device="cuda") / math.sqrt(32*7*7),
    'fc.bias': torch.zeros(10, device="cuda"),
}
shapes = get_weight_shapes(params)  # Conv weights flattened: (16, 9), (32, 144), ...

# ========== FORWARD FUNCTIONS ==========
def forward_perturbed(x, params, perts):
    \"\"\"x: (batch, 1, 28, 28) -> (pop, batch, 10)\"\"\"
    # Conv1 + ReLU + Pool
    x = perturbed_conv2d(x, params['conv1.weight'], perts, 'conv1.weight', padding=1)
    x = torch.relu(x)
    # max_pool2d needs 4D: reshape (pop, batch, C, H, W) -> (pop*batch, C, H, W)
    pop, batch = x.shape[0], x.shape[1]
    x = x.reshape(pop * batch, *x.shape[2:])
    x = F.max_pool2d(x, 2)
    x = x.reshape(pop, batch, *x.shape[1:])
    
    # Conv2 + ReLU + Pool
    x = perturbed_conv2d(x, params['conv2.weight'], perts, 'conv2.weight', padding=1)
    x = torch.relu(x)
    x = x.reshape(pop * batch, *x.shape[2:])
    x = F.max_pool2d(x, 2)
    x = x.reshape(pop, batch, *x.shape[1:])
    
    # Flatten + FC
    x = x.reshape(pop, batch, -1)
    return perturbed_forward(x, params['fc.weight'], params['fc.bias'], perts, 'fc.weight')

def forward_clean(x, params):
    \"\"\"x: (batch, 1, 28, 28) -> (batch, 10)\"\"\"
    x = F.conv2d(x, params['conv1.weight'], padding=1)
    x = torch.relu(F.max_pool2d(x, 2))
    x = F.conv2d(x, params['conv2.weight'], padding=1)
    x = torch.relu(F.max_pool2d(x, 2))
    x = x.flatten(1)
    return x @ params['fc.weight'].T + params['fc.bias']
"""
TEMPLATE = """
for epoch in range(max_epochs):
    # 1. Generate perturbations for this epoch
    gen = torch.Generator(device="cuda").manual_seed(seed + epoch)
    perts = generate_perturbations(shapes, pop_size, rank, sigma, gen, dtype)
    
    # 2. Get input data
    #    - RL: observations from environment
    #    - SL: sample a mini-batch (IMPORTANT: sample NEW batch each epoch!)
    x = get_batch()  # Shape: (batch, input_dim)
    
    # 3. Expand for population: (batch, in) -> (pop, batch, in)
    x_pop = x.unsqueeze(0).expand(pop_size, -1, -1)
    
    # 4. Run perturbed forward
    outputs = forward_perturbed(x_pop, params, perts)
    
    # 5. Compute fitness (one scalar per population member)
    fitnesses = compute_fitness(outputs, targets)  # -> (pop_size,)
    fitnesses = normalize_fitnesses(fitnesses)
    
    # 6. Compute ES gradients and update
    grads = compute_gradients(fitnesses, perts, pop_size)
    update_params(params, grads, lr)
    
    # 7. (Optional) Decay sigma for stability
    sigma *= sigma_decay
    
    # 8. (Optional) Evaluate on clean forward
    with torch.no_grad():
        eval_out = forward_clean(test_x, params)
"""


def run(snippet, **names):
    names = {"torch": torch, "F": F, "math": math, **names}
    exec(compile(IMPORTS + snippet.replace('device="cuda"', 'device="cpu"'), "recipe", "exec"), names)
    return names


SIZES = {"pop_size": 64, "rank": 4, "sigma": 0.1, "lr": 0.1, "dtype": torch.float32, "sigma_decay": 0.999, "seed": 42}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Reset:
    """As much of an environment as the recipe uses: it leaves the episode itself to its reader."""

    def __init__(self):
        self.observations = []

    def reset(self):
        self.observations.append(torch.randn(5, 4))
        return self.observations[-1]


def test_cartpole():
    gen, env = torch.Generator().manual_seed(0), Reset()
    made = run(CARTPOLE, max_epochs=3, gen=gen, env=env, episode_returns=torch.randn(64), **SIZES)
    assert len(env.observations) == 3
    assert made["logits"].shape == (64, 5, 2)
    member = {key: made["params"][key] for key in made["params"]}
    assert made["forward_clean"](env.observations[0], member).shape == (5, 2)


def images():
    """Images of the real MNIST where they are, else two clouds of noise that a classifier can tell apart."""
    folder = Path(os.environ.get("EGGROLL_DATA_DIR", "")) / "mnist"
    if folder.is_dir():
        from eggroll.recipes.images import load

        found = load(str(folder), torch.device("cpu"))
        return found.train[0][:4096].flatten(1), found.train[1][:4096]
    labels = torch.arange(4096) % 10
    return torch.randn(10, 784)[labels] + torch.randn(4096, 784), labels


def test_mnist():
    """40 generations of 512 members: better than twice the 10 % of guessing."""
    x, labels = images()
    names = {**SIZES, "pop_size": 512, "sigma": 0.05}
    made = run(
        MNIST, max_epochs=40, gen=torch.Generator().manual_seed(0), train_imgs=x, train_labels=labels, batch_size=64,
        **names,
    )  # fmt: skip
    with torch.no_grad():
        answers = made["forward_clean"](x, made["params"]).argmax(1)
    assert (answers == labels).double().mean() > 0.2
    assert made["sigma"] == pytest.approx(0.05 * 0.999**40)


def test_mnist_cnn():
    """The forward of the recipe; without noise it is the clean one, up to the order of pooling and relu."""
    made = run(MNIST_CNN)
    assert made["shapes"] == {"conv1.weight": (16, 9), "conv2.weight": (32, 144), "fc.weight": (10, 1568)}
    draw, params = made["generate_perturbations"], made["params"]
    x = torch.randn(3, 1, 28, 28)
    perts = draw(made["shapes"], 4, 2, 0.0, torch.Generator().manual_seed(0), torch.float32)
    outputs = made["forward_perturbed"](x, params, perts)
    assert outputs.shape == (4, 3, 10)
    expected = made["forward_clean"](x, params).expand(4, 3, 10)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", [CARTPOLE.split("# ========== TRAINING LOOP")[0]])
def test_the_training_template(network):
    """On the network of the first recipe: its outputs move towards their targets."""
    torch.manual_seed(1)
    x = torch.randn(16, 4)
    targets = torch.stack([x[:, 0], -x[:, 1]], 1)

    def fitness(outputs, wanted):
        return -(outputs - wanted).square().mean((1, 2))

    made = run(network)
    before = fitness(made["forward_clean"](x, made["params"])[None], targets).item()
    names = {name: made[name] for name in ("params", "shapes", "forward_perturbed", "forward_clean")}
    made = run(
        TEMPLATE, max_epochs=60, get_batch=lambda: x, compute_fitness=fitness, targets=targets, test_x=x,
        **names, **SIZES,
    )  # fmt: skip
    after = fitness(made["eval_out"][None], targets).item()
    assert np.isfinite(after)
    assert after > before / 2
