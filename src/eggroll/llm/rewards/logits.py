"""A model's logits a few time steps at a time, so that ``rows * time * vocab`` numbers never exist at once.

The body of the model runs once. Then the whole model is called for one piece of time after the other, with its body's
``forward`` replaced by one that hands back that piece of the hidden states. What stands between the hidden states and
the logits (scalings, the head, soft caps, biases) is therefore the model's own code, whatever the architecture; and
since modules are only called, it works unchanged while parameters stand for a whole population.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eggroll.errors import ModelError


def chunked_logits(model: nn.Module, inputs: dict[str, Any], budget: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces of the logits along time: the first time step, and logits ``(rows, steps, vocab)``.

    Args:
        model: a causal or encoder-decoder language model of transformers.
        inputs: its keyword arguments, on its device. Rows come first in each.
        budget: bytes that one piece of logits, and what a loss makes of it, may take. At least one step is made.

    A model whose body and head cannot be told apart gives all its logits in one piece.
    """
    inputs = {**inputs, "use_cache": False, "return_dict": True}
    body = getattr(model, "base_model", model)
    if body is not model:
        output = body(**inputs)
    elif "decoder_input_ids" in inputs and hasattr(model, "encoder") and hasattr(model, "decoder"):
        body, output, inputs = _run_encoder_decoder(model, inputs)
    else:
        yield 0, model(**inputs).logits
        return
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        yield 0, model(**inputs).logits
        return
    step = _steps(model, hidden, budget)
    timed = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    for start in range(0, hidden.shape[1], step):
        ids = inputs[timed][:, start : start + step]
        # Contiguous: a product of strided rows copies the output head once per row in bfloat16.
        with _forward_replaced(body, output, hidden[:, start : start + step].contiguous()) as was_called:
            logits = model(**{**inputs, timed: ids}).logits
        if not was_called() or logits.shape[1] != ids.shape[1]:
            raise ModelError(
                f"{type(model).__name__} does not make its logits from the output of its {type(body).__name__}; "
                "use a CustomReward for this model"
            )
        yield start, logits


def _run_encoder_decoder(model: Any, inputs: dict[str, Any]) -> tuple[nn.Module, Any, dict[str, Any]]:
    """T5 and its family have no module that holds encoder and decoder without the head."""
    encoded = model.encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), return_dict=True
    )
    output = model.decoder(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=inputs.get("attention_mask"),
        use_cache=False,
        return_dict=True,
    )
    return model.decoder, output, {**inputs, "encoder_outputs": encoded}


def _steps(model: Any, hidden: Tensor, budget: int) -> int:
    """Time steps whose logits, in the model's dtype and as float32 log-probabilities, fit the budget."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    vocab = int(getattr(config, "vocab_size", 0) or 50_000)
    widened = hidden.element_size() if hidden.element_size() < 4 else 0
    per_entry = widened + 2 * max(hidden.element_size(), 4)
    return max(1, budget // (hidden.shape[0] * vocab * per_entry))


@contextmanager
def _forward_replaced(module: nn.Module, output: Any, hidden: Tensor) -> Iterator[Callable[[], bool]]:
    """While this lasts, calling ``module`` returns ``output`` with these hidden states; yields whether it was called.

    A call with fewer rows (with which a population compares members together and alone) gets those of the first row
    for each: the same for every member, whichever rows those are.
    """
    calls = 0

    def forward(*args: Any, **inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        ids = args[0] if args else inputs.get("input_ids")
        rows = hidden if ids is None or len(ids) == len(hidden) else hidden[:1].expand(len(ids), -1, -1)
        return type(output)(**{**output, "last_hidden_state": rows})

    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield lambda: calls > 0
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
