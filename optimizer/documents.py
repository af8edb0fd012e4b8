"""The documents to read: those that variants answered differently, most telling first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimizer.compare_report import Answer, Document, TaskDocuments
from optimizer.evals.items import Item

LISTED = 200  # documents of a task that a comparison holds
LISTED_TEXTS = 20  # of a task that only scores texts, where every document differs a little


def differing_documents(
    items: Mapping[str, Sequence[Item]],
) -> tuple[list[Document], list[TaskDocuments]]:
    """Documents where an answer is not the first variant's, and how many there are of each task.

    Those that changed between right and wrong come first, then those that merely changed; texts by how much their
    log-likelihood moved, as a share of the first variant's.
    """
    if not items:
        return [], []
    first, *others = items
    theirs = {name: {item.key: item for item in items[name]} for name in others}
    found: dict[str, list[Document]] = {}
    totals: dict[str, int] = {}
    for base in items[first]:
        totals[base.task] = totals.get(base.task, 0) + 1
        answers = {first: base} | {name: known[base.key] for name, known in theirs.items() if base.key in known}
        if document := _document(first, answers):
            found.setdefault(base.task, []).append(document)
    listed: list[Document] = []
    counts = []
    scored = {task for task, documents in found.items() if all(d.gold is None for d in documents)}
    for task, total in sorted(totals.items(), key=lambda each: each[0] in scored):  # mere likelihoods come last
        documents = sorted(found.get(task, []), key=lambda d: -d.change)
        texts = task in scored
        kept = documents[: LISTED_TEXTS if texts else LISTED]
        listed += kept
        counts.append(TaskDocuments(task=task, total=total, differing=len(documents), listed=len(kept)))
    return listed, counts


def _document(first: str, answers: Mapping[str, Item]) -> Document | None:
    """The document, or None where every answer is the first variant's."""
    base = answers[first]
    rows = [
        Answer(variant=name, text=item.answer, right=_right(item), differs=_differs(base, item))
        for name, item in answers.items()
    ]
    if not any(row.differs for row in rows):
        return None
    if base.likelihood is not None:
        moved = max(abs((item.likelihood or 0.0) - base.likelihood) for item in answers.values())
        change = moved / abs(base.likelihood) if base.likelihood else 0.0
    else:
        change = float(len({row.right for row in rows}) - 1) + sum(row.differs for row in rows) / (1 + len(rows))
    return Document(
        task=base.task, document=base.document, context=base.context, gold=base.gold, change=change, answers=rows
    )


def _differs(base: Item, item: Item) -> bool:
    return item.answer != base.answer or _right(item) != _right(base)


def _right(item: Item) -> bool | None:
    """Whether the answer is right, by the metric that chose it; None where no metric says right or wrong."""
    for name in ("acc_norm", "acc", "exact_match"):
        if name in item.scores:
            return item.scores[name] > 0
    values = set(item.scores.values())
    return next(iter(values)) > 0 if len(values) == 1 and values <= {0.0, 1.0} else None
