"""Calibration data: text, chats, token ids or a `datasets` object, as rows of tokens.

Rows are never padded. *Packed*: documents are joined, an end token between them, and cut into rows of `length`.
*Ragged* (`packed=False`): each document is a row of its own, cut at `length`; rows of one length form batches. Tokens
that an `attention_mask` hides are dropped. So no statistic sees padding, and no mask is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, groupby, islice
from typing import Any

import torch
from torch import Tensor

from optimizer.errors import DataError

TEXT_KEYS = ("text", "content", "prompt", "instruction")
CHAT_KEYS = ("messages", "conversations", "conversation")
FEWEST_TOKENS = 512
"""The fewest tokens that calibration may have: one window of the shortest context in use."""

_BYTES = bytes | bytearray | memoryview  # sequences of integers that are no token ids
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows of token ids (int64 `[S]` each, longest first), and where they came from."""

    rows: tuple[Tensor, ...]
    source: str = "given data"

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over every row's length and ids."""
        total = hashlib.sha256()
        for row in self.rows:
            total.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
        return total.hexdigest()

    def batches(self, tokens: int = 4096) -> list[Tensor]:
        """Rows of one length stacked `[B, S]`, each batch of at most `tokens` tokens or one row."""
        stacked: list[Tensor] = []
        for length, group in groupby(self.rows, key=len):
            stacked += torch.stack(list(group)).split(max(1, tokens // length))
        return stacked

    def __str__(self) -> str:
        """Such as `128 rows, 65536 tokens of given data`."""
        return f"{len(self.rows)} rows, {self.tokens} tokens of {self.source}"


def calibrate_on(
    data: Any, tokenizer: Any, *, samples: int, length: int, packed: bool = True, vocabulary: int, source: str = ""
) -> Calibration:
    """`samples` rows of at most `length` tokens from `data`, in its order.

    `data` is a text; a sequence of texts; token ids (a tensor `[R, S]`, or sequences of ids); chats (lists of
    `{"role", "content"}`, through the tokenizer's chat template); or rows of a `datasets` object, streamed or not, that
    hold one of these under `TEXT_KEYS`, `CHAT_KEYS` or `input_ids`. It is read no further than needed; fewer rows than
    asked for are used as they are.

    Raises:
        DataError: data that is empty, of another kind, of fewer than `FEWEST_TOKENS` tokens, or with ids that the model
            has no embedding for.
    """
    documents = (ids for ids in _documents(data, tokenizer) if ids)
    rows = list(islice(_packed(documents, tokenizer, length) if packed else _cut(documents, length), samples))
    found = sum(map(len, rows))
    if not found:
        raise DataError("the calibration data is empty. Give data like what the model will be used on.")
    if found < FEWEST_TOKENS:
        raise DataError(
            f"the calibration data has {found} tokens; at least {FEWEST_TOKENS} are needed. Give more, or raise the "
            f"recipe's calibration (samples {samples}, length {length})."
        )
    least, most = min(map(min, rows)), max(map(max, rows))
    if least < 0 or most >= vocabulary:
        raise DataError(
            f"the calibration data has token {most if least >= 0 else least}; the model's ids are 0 to "
            f"{vocabulary - 1}. Tokenize it with this model's tokenizer."
        )
    tensors = sorted((torch.tensor(row, dtype=torch.long) for row in rows), key=len, reverse=True)
    return Calibration(tuple(tensors), source or "given data")


def _documents(data: Any, tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each document."""
    if isinstance(data, str):
        yield _tokenized(data, tokenizer)
        return
    if not isinstance(data, _BYTES) and getattr(data, "ndim", 2) < 2:
        data = data.tolist()
    if isinstance(data, _BYTES | Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"calibration must be text, texts, chats, token ids or a datasets object, not {type(data).__name__}. Of a "
            "dict, give one entry, such as its train split."
        )
    if isinstance(data, Sequence) and data and all(type(item) is int for item in data):
        yield list(data)  # one document of ids
        return
    for index, item in enumerate(data):
        yield _document(item, tokenizer, index)


def _document(item: Any, tokenizer: Any, index: int) -> list[int]:
    if isinstance(item, str):
        return _tokenized(item, tokenizer)
    if isinstance(item, Mapping):
        key = next((k for k in ("input_ids", *CHAT_KEYS, *TEXT_KEYS) if item.get(k) is not None), None)
        if key is None:
            raise DataError(
                f"calibration row {index} has the columns {', '.join(map(str, item))}; one of input_ids, "
                f"{', '.join((*CHAT_KEYS, *TEXT_KEYS))} is needed. Rename the column that holds the text."
            )
        if key == "content" and "role" in item:
            raise DataError(
                f"calibration row {index} is one turn of a chat. Give a list of chats, each a list of turns."
            )
        ids = _document(item[key], tokenizer, index)
        mask = item.get("attention_mask") if key == "input_ids" else None
        return ids if mask is None else list(compress(ids, mask))
    if not isinstance(item, _BYTES) and hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, Sequence) and not isinstance(item, _BYTES):
        if all(type(part) is int for part in item):
            return list(item)
        if all(isinstance(part, Mapping) for part in item):
            return _chat(item, tokenizer, index)
    raise DataError(
        f"calibration row {index}, of type {type(item).__name__}, is no text, no chat and no list of token ids."
    )


def _chat(turns: Sequence[Mapping[str, Any]], tokenizer: Any, index: int) -> list[int]:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"calibration row {index} is a chat, but the tokenizer has no chat template. Give plain text, or set "
            "tokenizer.chat_template."
        )
    named = [
        {"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
        for turn in turns
    ]
    if not all(isinstance(turn["role"], str) and turn["content"] is not None for turn in named):
        raise DataError(f"calibration row {index}: a turn of a chat needs a role and a content.")
    try:
        text = tokenizer.apply_chat_template(
            [turn | {"role": _ROLES.get(turn["role"], turn["role"])} for turn in named], tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"calibration row {index} does not fit the tokenizer's chat template: {error}. Leave such chats out."
        ) from None
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tokenized(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise DataError("calibration text needs a tokenizer. Pass tokenizer=, or give token ids.")
    return list(tokenizer(text, verbose=False)["input_ids"]) if text.strip() else []


def _packed(documents: Iterable[list[int]], tokenizer: Any, length: int) -> Iterator[list[int]]:
    end = getattr(tokenizer, "eos_token_id", None)
    pending: list[int] = []
    between: list[int] = []
    for ids in documents:
        pending += between + ids
        between = [] if end is None or ids[-1] == end else [end]
        for start in range(0, len(pending) - length + 1, length):
            yield pending[start : start + length]
        pending = pending[len(pending) // length * length :]
    if pending:
        yield pending


def _cut(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    for ids in documents:
        yield ids[:length]
