"""`RunnerLM`: any `Runner` as an lm-eval model, so that quality is measured on exactly what will be deployed.

Scoring runs `prefill` on left-padded batches of similar length; generation runs `generate`, and stops as soon as
every row has met a stop string. Requests are ordered by length, longest first, and a batch is cut short where its
logits `[B, S, V]` would exceed `LOGITS_BYTES`. Contexts longer than the window lose their left end, as in lm-eval.

One difference from lm-eval's own Hugging Face adapter: it splits the encoding of context + continuation at the
*length* of the encoded context, which drops or repeats text wherever a token spans the seam (")" + "\\n" → ")\\n").
Here the split is at the last token both encodings share, so the spanning token is scored as part of the continuation.
Where no token spans the seam the two agree exactly.

lm-eval: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.functional import cross_entropy

from optimizer.errors import DataError, ModelError
from optimizer.evals.runner import Runner

LOGITS_BYTES = 256 << 20
DEFAULT_GENERATED_TOKENS = 256

Progress = Callable[[str, int, int], None]
"""Called with the kind of request, how many are done, and how many there are."""
Scored = tuple[float, bool]


class _AllStopped(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside `generate` by the token callback: every row has met a stop string."""


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    same = (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(same, min(len(first), len(second)))


class RunnerLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """Adapts `runner` and its Hugging Face `tokenizer` to lm-eval.

    `generate_batch` rows are generated at a time (`batch_size`
    unless given): a compiled runner has a graph a batch size. `max_length` bounds the window (tokens) below
    `runner.max_context`. `non_finite` counts requests whose
    log-likelihood was NaN or infinite: such a model is broken, and its accuracy is that of a coin.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        generate_batch: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.runner, self.tokenizer, self.batch_size, self.seed = runner, tokenizer, batch_size, seed
        self.generate_batch = generate_batch or batch_size
        self.max_length = min(runner.max_context, max_length or runner.max_context)
        self.non_finite = 0
        self._progress = progress or (lambda _kind, _done, _total: None)
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token; set tokenizer.eos_token")

    @property
    def device(self) -> torch.device:
        """Where the runner lives."""
        return self.runner.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the begin-of-text token, else end-of-text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of `string`; by default with the special tokens the tokenizer itself adds, never two BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        trimmed = context.rstrip()
        whole = self.tok_encode(context + continuation)
        split = _shared_prefix(self.tok_encode(trimmed), whole)
        return whole[:split] or [self.prefix_token_id], whole[split:]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """Log-likelihood (nats) of each continuation given its context, and whether it is the greedy choice."""
        for request in requests:
            if not request.args[1]:
                raise DataError(f"a document of task {request.task_name!r} asks to score an empty continuation")
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood (nats) of each whole text, every token scored once, in windows with the most context."""
        del disable_tqdm
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            rows = [make_disjoint_window(window) for window in windows]
            pairs += rows
            owners += [index] * len(rows)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs, "loglikelihood_rolling"), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        return self._score([(context, continuation) for _text, context, continuation in requests], "loglikelihood")

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], kind: str) -> list[Scored]:
        """Score token pairs (context, continuation), each of at least one token."""
        for _context, continuation in pairs:
            if not 1 <= len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation has {len(continuation)} tokens; the window scores 1 to {self.max_length}: "
                    "raise max_length or change the document"
                )
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        scored: dict[int, Scored] = {}
        for batch in self._batches([len(row) - 1 for row in rows], self.batch_size):
            wanted = [len(pairs[index][1]) for index in batch]
            scored.update(zip(batch, self._score_batch([rows[index] for index in batch], wanted), strict=True))
            self._progress(kind, len(scored), len(rows))
        self.non_finite += sum(not math.isfinite(value) for value, _ in scored.values())
        return [scored[index] for index in range(len(rows))]

    def _score_batch(self, rows: list[list[int]], wanted: list[int]) -> list[Scored]:
        """Score the last `wanted` tokens of each row."""
        longest = max(wanted)
        tokens, mask = self._pad([row[:-1] for row in rows])
        targets, _ = self._pad([row[-count:] for row, count in zip(rows, wanted, strict=True)])
        self.runner.reset(len(rows))
        if longest == 1:  # the logits after the last token are all that is needed
            logits = self.runner.prefill(tokens, mask)[:, None]  # [B, 1, V]
        else:
            logits = self.runner.prefill(tokens, mask, all_logits=True)[:, -longest:]  # [B, T, V]
        nats = -cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # [B, T]
        greedy = logits.argmax(-1) == targets
        return [
            (float(nats[row, -count:].double().sum()), bool(greedy[row, -count:].all()))
            for row, count in enumerate(wanted)
        ]

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Left-pad to `[B, S]`; the mask is None where nothing was padded."""
        longest = max(map(len, rows))
        pad = self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.device)
        if all(len(row) == longest for row in rows):
            return tokens, None
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return tokens, mask

    def _batches(self, lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
        """Indices in batches of similar length, longest first, within `batch_size` and `LOGITS_BYTES`."""
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        while order:
            row_bytes = lengths[order[0]] * self.runner.vocab_size * 4
            size = max(1, min(batch_size, LOGITS_BYTES // max(1, row_bytes)))
            yield order[:size]
            order = order[size:]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context (greedily unless the task samples) up to its first stop string."""
        del disable_tqdm
        groups: dict[str, list[int]] = {}  # one set of options for a batch
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts: dict[int, str] = {}
        for members in groups.values():
            options = dict(normalize_gen_kwargs(requests[members[0]].args[1], DEFAULT_GENERATED_TOKENS))
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise DataError(
                    f"max_gen_toks is {options['max_gen_toks']} but the window holds {self.max_length} tokens, "
                    "prompt included; lower max_gen_toks or raise max_length"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] or [self.prefix_token_id] for index in members]
            for batch in self._batches([len(prompt) for prompt in prompts], self.generate_batch):
                made = self._generate([prompts[row] for row in batch], options)
                texts.update((members[row], text) for row, text in zip(batch, made, strict=True))
                self._progress("generate_until", len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Texts that follow the prompts, cut at the first stop string."""
        stops = [stop for stop in options["until"] if stop]
        tokens, mask = self._pad(prompts)
        made: list[list[int]] = [[] for _ in prompts]
        done: set[int] = set()

        def collect(step: Tensor) -> None:
            for row, token in enumerate(step.tolist()):
                if row in done:
                    continue
                if token == self.eot_token_id:
                    done.add(row)
                    continue
                made[row].append(token)
                # The whole text is decoded, since a stop string may span tokens and a token half a character.
                if stops and any(stop in self._decode(made[row]) for stop in stops):
                    done.add(row)
            if len(done) == len(prompts):
                raise _AllStopped

        sampling = {key: options[key] for key in ("top_k", "top_p") if options.get(key) is not None}
        self.runner.reset(len(prompts))
        with contextlib.suppress(_AllStopped):
            self.runner.generate(
                tokens,
                mask,
                max_new_tokens=options["max_gen_toks"],
                temperature=options.get("temperature", 0.0) if options.get("do_sample") else 0.0,
                eos_token_id=self.eot_token_id,
                seed=self.seed,
                on_token=collect,
                **sampling,
            )
        return [postprocess_generated_text(self._decode(row), stops, None) for row in made]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
