"""Calibration rows: every kind of data, packed or ragged, against joining and cutting by hand; then hostile data."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import DataError
from optimizer.passes.calibration import CHAT_KEYS, FEWEST_TOKENS, TEXT_KEYS, Calibration, calibrate_on
from tests.optimizer.tiny_models import byte_tokenizer

END = 1  # of the byte tokenizer
TEXT = "".join(chr(97 + i * i % 26) for i in range(700))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TURNS = [{"role": "user", "content": TEXT[:400]}, {"role": "assistant", "content": TEXT[400:]}]
SHARED = [{"from": "human", "value": TEXT[:400]}, {"from": "gpt", "value": TEXT[400:]}]


def rows_of(data: Any, tokenizer: Any = None, **changes: Any) -> list[list[int]]:
    options = {"samples": 64, "length": 128, "vocabulary": 320} | changes
    return [row.tolist() for row in calibrate_on(data, tokenizer, **options).rows]


def ids_of(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


def documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 300) for _ in range(length)] for length in lengths]


def flat(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def starting_tokenizer() -> Any:
    """One that puts `<s>` before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    return tokenizer


# Rows


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=10),
    length=st.sampled_from([8, 127, 128, 600]),
    samples=st.sampled_from([1, 5, 1000]),
    ended=st.booleans(),
)
def test_packed_rows_are_the_joined_documents_cut(lengths: list[int], length: int, samples: int, ended: bool) -> None:
    given_ids = [ids + [END] * ended for ids in documents(*lengths, 600) if ids]
    joined: list[int] = []
    for ids in given_ids:
        joined += ids if ended else [*ids, END]
    joined = joined if ended else joined[:-1]  # between documents, not after the last
    expected = [joined[i : i + length] for i in range(0, len(joined), length)][:samples]
    if len(flat(expected)) < FEWEST_TOKENS:
        with pytest.raises(DataError, match=f"samples {samples}, length {length}"):
            rows_of(given_ids, byte_tokenizer(), length=length, samples=samples)
    else:
        assert rows_of(given_ids, byte_tokenizer(), length=length, samples=samples) == expected


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), max_size=10), length=st.sampled_from([8, 128, 600]))
def test_ragged_rows_are_the_cut_documents_longest_first(lengths: list[int], length: int) -> None:
    given_ids = documents(*lengths, *[600] * 70)
    expected = [ids[:length] for ids in given_ids if ids]
    expected.sort(key=len, reverse=True)  # stable: equal lengths stay in the data's order
    assert rows_of(given_ids, byte_tokenizer(), length=length, samples=1000, packed=False) == expected


def test_without_an_end_token_documents_are_joined_as_they_are() -> None:
    given_ids = documents(100, 300, 200)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    for unended in (None, tokenizer):
        rows = rows_of(given_ids, unended)
        assert flat(rows) == flat(given_ids)
        assert list(map(len, rows)) == [128, 128, 128, 128, 88]


def test_one_document_of_whole_rows_leaves_no_row_over() -> None:
    (ids,) = documents(512)
    assert rows_of([ids], byte_tokenizer()) == [ids[i : i + 128] for i in range(0, 512, 128)]


def test_samples_are_the_first_rows_before_sorting() -> None:
    given_ids = documents(300, 10, 300, 300)
    assert rows_of(given_ids, samples=3, length=300, packed=False) == [given_ids[0], given_ids[2], given_ids[1]]


@pytest.mark.parametrize(("packed", "read"), [(True, 7), (False, 10)])
def test_an_endless_stream_is_read_no_further_than_needed(packed: bool, read: int) -> None:
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        for number in count():
            taken += 1
            yield [number % 300] * 100

    rows = rows_of(endless(), samples=10, length=64, packed=packed)
    assert len(flat(rows)) == 640
    assert taken == read


def test_batches_hold_rows_of_one_length_and_no_more_tokens_than_asked() -> None:
    calibration = calibrate_on(
        documents(300, 50, 300, 7, 300, 50, 300, 300), None, samples=8, length=300, packed=False, vocabulary=320
    )
    assert [tuple(batch.shape) for batch in calibration.batches(600)] == [(2, 300), (2, 300), (1, 300), (2, 50), (1, 7)]
    assert [len(batch) for batch in calibration.batches(1)] == [1] * 8  # a row is never cut
    assert [len(batch) for batch in calibration.batches(10**9)] == [5, 2, 1]
    for tokens in (1, 600, 10**9):
        stacked = [row for batch in calibration.batches(tokens) for row in batch]
        assert all(torch.equal(a, b) for a, b in zip(stacked, calibration.rows, strict=True))


def test_it_says_what_it_is() -> None:
    calibration = calibrate_on(documents(600), None, samples=9, length=512, vocabulary=320)
    assert str(calibration) == "2 rows, 600 tokens of given data"
    assert all(row.dtype == torch.long for row in calibration.rows)
    named = calibrate_on(documents(600), None, samples=9, length=512, vocabulary=320, source="a file")
    assert str(named) == "2 rows, 600 tokens of a file"


# Kinds of data


def test_a_text_and_texts_are_tokenized() -> None:
    assert flat(rows_of(TEXT, byte_tokenizer())) == ids_of(TEXT)
    joined = [*ids_of(TEXT), END, *ids_of("b" + TEXT)]
    assert flat(rows_of([TEXT, "", " \n", "b" + TEXT], byte_tokenizer())) == joined
    assert flat(rows_of((t for t in (TEXT, "b" + TEXT)), byte_tokenizer())) == joined
    assert flat(rows_of(np.array([TEXT, "b" + TEXT]), byte_tokenizer())) == joined


IDS = torch.tensor(documents(300, 300))


@pytest.mark.parametrize(
    "data",
    [
        IDS, IDS.int(), IDS.numpy(), IDS.numpy().astype(np.uint16), IDS.tolist(), tuple(map(tuple, IDS.tolist())),
        list(IDS), list(IDS.numpy()), IDS.t().contiguous().t(),
    ],
    ids=lambda data: type(data).__name__,
)  # fmt: skip
def test_ids_of_every_kind_are_the_same_rows(data: Any) -> None:
    assert rows_of(data) == rows_of(IDS.tolist())
    assert flat(rows_of(data)) == IDS.flatten().tolist()


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_a_flat_sequence_of_ids_is_one_document(kind: Any) -> None:
    (ids,) = documents(600)
    assert flat(rows_of(kind(ids), byte_tokenizer())) == ids


def test_what_a_mask_hides_is_no_token() -> None:
    ids = documents(300, 300)
    padded = [[*row, *[2] * 40] for row in ids]
    mask = [[1] * 300 + [0] * 40] * 2
    left = [[2] * 40 + row for row in ids]
    for given_ids, given_mask in ((padded, mask), (left, [m[::-1] for m in mask])):
        pairs = zip(given_ids, given_mask, strict=True)
        rows = [{"input_ids": i, "attention_mask": m} for i, m in pairs]
        assert flat(rows_of(rows)) == flat(ids)
        tensors = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
        assert flat(rows_of(tensors)) == flat(ids)
    assert flat(rows_of([{"input_ids": row, "attention_mask": None} for row in ids])) == flat(ids)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("key", TEXT_KEYS)
def test_a_dataset_of_texts(key: str, streamed: bool) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"id": 5, key: TEXT}, {"id": 6, key: "b"}])
    rows = rows_of(data.to_iterable_dataset() if streamed else data, byte_tokenizer())
    assert flat(rows) == [*ids_of(TEXT), END, *ids_of("b")]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("turns", [TURNS, SHARED], ids=["messages", "sharegpt"])
@pytest.mark.parametrize("key", CHAT_KEYS)
def test_a_dataset_of_chats_goes_through_the_template(key: str, turns: Any, streamed: bool) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"text": "not this", key: turns}])
    rows = rows_of(data.to_iterable_dataset() if streamed else data, chat_tokenizer())
    assert flat(rows) == ids_of(f"<user>{TEXT[:400]}<assistant>{TEXT[400:]}")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", [None, "torch", "numpy"])
def test_a_dataset_of_ids(kind: str | None, streamed: bool) -> None:
    from datasets import Dataset

    ids = documents(300, 30, 300)
    data = Dataset.from_list([{"text": "not this", "input_ids": row} for row in ids]).with_format(kind)
    assert flat(rows_of(data.to_iterable_dataset() if streamed else data)) == flat(ids)


def test_chats_without_a_dataset() -> None:
    expected = ids_of(f"<user>{TEXT[:400]}<assistant>{TEXT[400:]}")
    assert flat(rows_of([TURNS], chat_tokenizer())) == expected
    assert flat(rows_of([SHARED, [], TURNS], chat_tokenizer())) == [*expected, END, *expected]


def test_a_role_that_sharegpt_does_not_rename_stays() -> None:
    rows = rows_of([[{"from": "system", "value": "x"}, *SHARED]], chat_tokenizer())
    assert flat(rows)[: len(ids_of("<system>x<user>"))] == ids_of("<system>x<user>")


def test_a_start_token_is_added_once_a_document() -> None:
    tokenizer = starting_tokenizer()
    assert flat(rows_of([TEXT, TEXT], tokenizer)) == [0, *ids_of(TEXT), END, 0, *ids_of(TEXT)]
    tokenizer.chat_template = "<s>" + TEMPLATE  # a template has its own
    chat = ids_of(f"<user>{TEXT[:400]}<assistant>{TEXT[400:]}")
    assert flat(rows_of([TURNS, TURNS], tokenizer)) == [0, *chat, END, 0, *chat]


def test_long_documents_raise_no_warning_of_the_tokenizer() -> None:
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenizer = chat_tokenizer()
        tokenizer.model_max_length = 10
        rows_of(TEXT, tokenizer)
        rows_of([TURNS], tokenizer)
        assert printed.getvalue() == ""
        tokenizer(TEXT)  # the warning that was not printed
        assert "longer than" in printed.getvalue()
    finally:
        logging.getLogger("transformers").removeHandler(handler)


# What cannot be used


@pytest.mark.parametrize(
    "data", ["", " \n", [], [""], ["", "\t"], [[]], [[], []], {}.values(), torch.empty(0, 5).long()]
)
@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_refused(data: Any, packed: bool) -> None:
    with pytest.raises(DataError, match="the calibration data is empty"):
        rows_of(data, byte_tokenizer(), packed=packed)


def test_the_fewest_tokens_are_enough_and_one_less_is_refused() -> None:
    assert len(flat(rows_of("x" * FEWEST_TOKENS, byte_tokenizer()))) == FEWEST_TOKENS
    with pytest.raises(DataError, match=r"has 511 tokens; at least 512 are needed\. .*samples 64, length 128"):
        rows_of("x" * (FEWEST_TOKENS - 1), byte_tokenizer())
    with pytest.raises(DataError, match=r"has 256 tokens.*raise the recipe's calibration \(samples 2, length 128\)"):
        rows_of("x" * 5000, byte_tokenizer(), samples=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x" * 600, "not bytes"),
        (bytearray(b"x" * 600), "not bytearray"),
        (memoryview(b"x" * 600), "not memoryview"),
        ({"train": ["x" * 600]}, r"not dict\. Of a dict, give one entry"),
        (5, "not int"),
        (None, "not NoneType"),
        (torch.tensor(5), "not int"),
        ([b"x" * 600], "row 0, of type bytes, is no text"),
        ([bytearray(b"x" * 600)], "row 0, of type bytearray, is no text"),
        ([memoryview(b"x" * 600)], "row 0, of type memoryview, is no text"),
        (["x" * 600, 5], "row 1, of type int"),
        ([True] * 600, "row 0, of type bool"),
        ([[True] * 600], "row 0, of type list"),
        ([[1.0] * 600], "row 0, of type list"),
        (torch.ones(2, 600), "row 0, of type list"),
        (torch.ones(2, 2, 600).long(), "row 0, of type list"),
        ([["x" * 600, "y"]], "row 0, of type list"),
        ([[*range(3), None]], "row 0, of type list"),
        ([None], "row 0, of type NoneType"),
        ([{"text": 5}], "row 0, of type int"),
        ([{"text": "x" * 600}, {"body": "x", "id": 3}], "row 1 has the columns body, id; one of input_ids, messages"),
        ([{"text": None}], "row 0 has the columns text; one of"),
        (TURNS, "row 0 is one turn of a chat. Give a list of chats"),
        ([[{"role": "user"}]], "row 0: a turn of a chat needs a role and a content"),
        ([[{"content": "x"}]], "row 0: a turn of a chat needs a role and a content"),
        ([[{"role": ["user"], "content": "x"}]], "row 0: a turn of a chat needs a role and a content"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_data_of_another_kind_is_refused(data: Any, message: str, packed: bool) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(data, chat_tokenizer(), packed=packed)


@pytest.mark.parametrize("data", [[TURNS], [SHARED], [{"messages": TURNS}]])
def test_a_chat_without_a_template_is_refused(data: Any) -> None:
    for tokenizer in (byte_tokenizer(), None):
        with pytest.raises(DataError, match="row 0 is a chat, but the tokenizer has no chat template"):
            rows_of(data, tokenizer)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ messages.nothing.at_all }}", "nothing"),
        ("{% for %}", "Expected"),
    ],
)
def test_a_chat_that_the_template_refuses_is_named(template: str, why: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"row 0 does not fit the tokenizer's chat template: .*{why}"):
        rows_of([TURNS], tokenizer)


@pytest.mark.parametrize("data", [TEXT, [TEXT], [{"text": TEXT}]])
def test_text_without_a_tokenizer_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="calibration text needs a tokenizer"):
        rows_of(data, None)


@pytest.mark.parametrize(("token", "vocabulary"), [(-1, 320), (320, 320), (2**70, 320), (256, 256)])
@pytest.mark.parametrize("packed", [True, False])
def test_an_id_that_the_model_lacks_is_refused(token: int, vocabulary: int, packed: bool) -> None:
    ids = [*[3] * 600, token]
    with pytest.raises(DataError, match=rf"has token {token}; the model's ids are 0 to {vocabulary - 1}\."):
        rows_of([ids], vocabulary=vocabulary, length=601, packed=packed)
    assert rows_of([[*[3] * 600, vocabulary - 1, 0]], vocabulary=vocabulary, length=602)


# Identity


def test_the_digest_is_of_ids_and_rows_alone() -> None:
    (ids,) = documents(600)

    def digest(*rows: list[int], **options: Any) -> str:
        return Calibration(tuple(torch.tensor(row) for row in rows), **options).digest

    first = digest(ids)
    assert first == digest(list(ids), source="elsewhere")
    assert first == calibrate_on([ids], None, samples=1, length=600, vocabulary=320, source="x").digest
    strided = Calibration((torch.tensor(ids).repeat_interleave(2)[::2],))
    assert first == strided.digest
    for index in (0, 299, 599):
        changed = list(ids)
        changed[index] ^= 1
        assert digest(changed) != first
    assert digest([*ids, 0]) != first
    splits = {digest(ids[:cut], ids[cut:]) for cut in (1, 299, 300, 301)}
    assert len(splits | {first}) == 5


def test_the_same_data_gives_the_same_rows_and_no_generator_moves() -> None:
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    digests = {
        calibrate_on([TEXT, TEXT[::-1]], byte_tokenizer(), samples=9, length=100, packed=packed, vocabulary=320).digest
        for packed in (True, True)
    }
    assert len(digests) == 1
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_the_callers_data_is_left_alone() -> None:
    ids = documents(600, 300)
    copies = [list(row) for row in ids]
    tensor = torch.tensor([ids[0]])
    first = calibrate_on(ids, byte_tokenizer(), samples=9, length=600, packed=False, vocabulary=320)
    second = calibrate_on(tensor, None, samples=9, length=600, packed=False, vocabulary=320)
    for calibration in (first, second):
        calibration.rows[0].zero_()
    assert ids == copies
    assert tensor.tolist() == [copies[0]]
