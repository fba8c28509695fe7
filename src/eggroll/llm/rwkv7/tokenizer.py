"""The tokenizer of the RWKV World models: the longest token that fits, byte by byte, from a list of 65,529 tokens."""

from __future__ import annotations

import ast
import functools
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from eggroll._optional import missing
from eggroll.errors import ModelError

VOCABULARY = "rwkv_vocab_v20230424.txt"
PACKAGES = ("rwkv", "pyrwkv_tokenizer")
"""Installed packages that the vocabulary is taken from where a model does not bring it."""
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[message['role']] }}"
    ": {{ message['content'] | trim }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def find_vocabulary() -> Path:
    """The vocabulary of an installed package; the package is not imported.

    Raises:
        MissingExtraError: none is installed.
    """
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder, VOCABULARY)).is_file():
                return path
    raise missing(f"the vocabulary of RWKV World models ({VOCABULARY}) is in no installed package", "rwkv")


@functools.lru_cache(maxsize=2)
def read_vocabulary(path: str | Path) -> dict[bytes, int]:
    """Tokens and their numbers: lines of ``number literal length``.

    Raises:
        ModelError: the file is no such list.
    """
    tokens: dict[bytes, int] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            number, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            value = ast.literal_eval(literal)
            token = value.encode() if isinstance(value, str) else value
            if len(token) != int(length):
                raise ValueError(f"token {number} has {len(token)} bytes, not {length}")
            tokens[token] = int(number)
    except (OSError, ValueError, SyntaxError) as error:
        raise ModelError(f"{path} is no vocabulary of RWKV ({error}); it has lines like: 258 ' the' 4") from error
    return tokens


class RWKV7Tokenizer(PreTrainedTokenizer):
    """Text to tokens and back. Token 0 ends a text and pads. A token's string has one character for each of its bytes.

    Args:
        vocab_file: the list of tokens; that of an installed package by default.
    """

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012  (as the base class has it)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, **arguments: Any) -> None:
        self.vocab_file = str(vocab_file or find_vocabulary())
        tokens = read_vocabulary(self.vocab_file)
        self.numbers = {token.decode("latin-1"): number for token, number in tokens.items()}
        self.numbers[END] = 0
        self.strings = {number: token for token, number in self.numbers.items()}
        # the lengths that tokens with the same first two bytes have, longest first
        lengths: dict[str, set[int]] = {}
        for token in self.numbers:
            lengths.setdefault(token[:2], set()).add(len(token))
        self.lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        arguments.setdefault("eos_token", END)
        arguments.setdefault("pad_token", END)
        arguments.setdefault("chat_template", CHAT_TEMPLATE)
        arguments.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**arguments)

    @property
    def vocab_size(self) -> int:
        """Numbers in use."""
        return max(self.strings) + 1

    def get_vocab(self) -> dict[str, int]:
        """Strings and numbers of all tokens."""
        return {**self.numbers, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self._pieces(text.encode("utf-8", errors="replace").decode("latin-1")))

    def _pieces(self, text: str) -> Iterator[str]:
        place = 0
        while place < len(text):
            lengths = self.lengths.get(text[place : place + 2], ())
            length = next((n for n in lengths if text[place : place + n] in self.numbers), 1)
            yield text[place : place + length]
            place += length

    def _convert_token_to_id(self, token: str) -> int:
        return self.numbers[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self.strings.get(index, "")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; bytes that are no UTF-8 become the replacement character."""
        return "".join(tokens).encode("latin-1", errors="ignore").decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The tokens themselves: a text begins and ends with nothing."""
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the list of tokens."""
        target = Path(save_directory, f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
