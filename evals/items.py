"""What a model answered to each document: the readable side of a quality run.

A metric says how many answers changed; these say which. lm-eval logs requests and responses as it made them, and three
kinds of request cover its tasks: choices scored by log-likelihood, generated text, and the likelihood of a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 2000  # characters of a text that are kept, the last ones of a context: few-shot prompts can be long


@dataclass(frozen=True)
class Item:
    """One document under one filter, as one model answered it.

    `answer` is the chosen choice, the filtered text, or nats per character of the text; `gold` the right answer, None
    where there is none. `scores` holds every 0/1 or other scalar metric of the document. `likelihood` is the
    log-likelihood (nats) of a scored text, None for other kinds.
    """

    task: str
    filter: str
    document: str
    context: str
    answer: str
    gold: str | None
    scores: Mapping[str, float]
    likelihood: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What pairs it with another model's answer."""
        return self.task, self.filter, self.document


def items_of(task: str, logged: Sequence[Mapping[str, Any]]) -> Iterator[Item]:
    """Items from lm-eval's logged samples of one task, in their order.

    A sample of a shape that none of the three kinds has is left out: what is only read must not stop an evaluation.
    """
    for row in logged:
        try:
            yield _item(task, row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            continue


def _item(task: str, row: Mapping[str, Any]) -> Item:
    arguments = [tuple(each) for each in row["arguments"]]
    responses = list(row["filtered_resps"])
    scores = {name: float(row[name]) for name in row.get("metrics", ()) if _is_number(row.get(name))}
    document = f"{row['doc_id']}:{row['doc_hash'][:16]}"
    if len(arguments) == 1 and len(arguments[0]) == 1:  # the likelihood of a text
        text, nats = str(arguments[0][0]), float(responses[0])
        answer = f"{-nats / max(1, len(text)):.4f} nats per character"
        return Item(task, row["filter"], document, _end(text), answer, None, scores, nats)
    if _is_scored(responses):  # choices
        choices = [str(each[1]) for each in arguments]
        if len(choices) > 1 and len(set(choices)) == 1:  # the same end after different beginnings
            choices = [str(each[0])[-200:] for each in arguments]
        answer, gold = _chosen(choices, responses, scores), _gold(row["target"], choices)
    else:
        answer, gold = _start(str(responses[0]) if responses else ""), _start(str(row["target"]))
    return Item(task, row["filter"], document, _end(str(arguments[0][0])), answer, gold, scores)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_scored(responses: Sequence[Any]) -> bool:
    return bool(responses) and all(isinstance(each, tuple | list) and len(each) == 2 for each in responses)


def _chosen(choices: Sequence[str], scored: Sequence[Any], scores: Mapping[str, float]) -> str:
    """The likeliest choice: by nats a character where the task has `acc_norm`, as that metric chooses."""
    nats = [float(value) for value, _ in scored]
    if len(choices) == 1:  # one continuation, right where it is the greedy one
        return f"{_start(choices[0])} ({'greedy' if scored[0][1] else 'not greedy'})"
    delimiter = all(choice.startswith(" ") for choice in choices)  # lm-eval does not count the one it puts in
    lengths = [max(1, len(choice) - delimiter) if "acc_norm" in scores else 1 for choice in choices]
    ranks = [
        value / length if not math.isnan(value) else -math.inf for value, length in zip(nats, lengths, strict=True)
    ]
    return _start(choices[max(range(len(ranks)), key=ranks.__getitem__)])


def _gold(target: Any, choices: Sequence[str]) -> str:
    """The right choice: lm-eval logs its index, as a number or a text."""
    text = str(target)
    return _start(choices[int(text)] if text.isdecimal() and int(text) < len(choices) else text)


def _end(text: str) -> str:
    return text if len(text) <= SHOWN else "…" + text[-SHOWN:]


def _start(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
