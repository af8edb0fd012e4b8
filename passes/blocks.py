"""Walking a decoder block by block: the inputs that reach each, without the rest of the model in memory.

The inputs of the first block, and what every block is given besides the hidden states (masks, rotary tables), come
from one run of the model in which each block is replaced by one that passes its input on. So any architecture of
transformers works that keeps its blocks in one `ModuleList` and calls them in order, and only the embeddings need to
have data. From then on a block's outputs are the next one's inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from optimizer.errors import ModelError
from optimizer.passes.calibration import Calibration


def block_names(model: Any) -> list[str]:
    """The decoder blocks' module names, in the order in which they run.

    They are the first `nn.ModuleList` with as many entries of one class as the configuration counts layers. Raises
    `ModelError` for a model without one.
    """
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and len({type(m) for m in module}) == 1:
            return [f"{name}.{index}" for index in range(len(module))]
    raise ModelError(
        f"{type(model).__name__} has no list of {layers} decoder blocks. Calibration and block-by-block work walk such "
        "blocks; a method without calibration (method: rtn) on the whole model in memory does not."
    )


class _Stop(Exception):  # noqa: N818 (it ends a run early and is no error)
    """The last block was reached."""


@dataclass
class BlockInputs:
    """What reaches the current block: hidden states `[B, S, H]` a batch, and the other arguments of every block.

    `others[batch shape][block]` holds positional and keyword arguments; they do not depend on the hidden states.
    """

    hidden: list[Tensor] = field(default_factory=list)
    others: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    tuples: bool = False

    def seen_by(self, block: nn.Module) -> nn.Module:
        """The block in the arithmetic of its inputs: itself, or a view whose weights are float32."""
        return in_float32(block) if self.hidden[0].dtype == torch.float32 else block

    def call(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The block's output `[B, S, H]` for one batch."""
        args, kwargs = self.arguments(index, hidden)
        with torch.no_grad():
            out = block(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def arguments(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a block for one batch of hidden states."""
        args, kwargs = self.others[tuple(hidden.shape[:2])][index]
        return (hidden, *args), kwargs

    def advance(self, block: nn.Module, index: int) -> None:
        """Let the block, as it is now, turn its inputs into the next one's, batch by batch in place."""
        seen = self.seen_by(block)
        for position, hidden in enumerate(self.hidden):
            self.hidden[position] = self.call(seen, index, hidden)


def in_float32(block: nn.Module) -> nn.Module:
    """A view of a block whose 16-bit parameters and buffers are float32; it shares all else, and is never saved."""
    wider: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        half = tensor.dtype in (torch.bfloat16, torch.float16)
        wide = tensor.detach().float() if half else tensor
        kept = nn.Parameter(wide, requires_grad=False) if half and isinstance(tensor, nn.Parameter) else wide
        wider[id(tensor)] = kept
    return copy.deepcopy(block, wider)


def calibration_dtype(model: Any, device: torch.device | None = None) -> torch.dtype:
    """The arithmetic of calibration: the model's own, or float32 where this processor has no 16-bit products.

    `device` is where a model without data will run.
    """
    weight = model.get_input_embeddings().weight
    slow = (device or weight.device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if slow else weight.dtype


def first_inputs(model: Any, calibration: Calibration, *, batch_tokens: int = 4096) -> BlockInputs:
    """The inputs of the first block for all calibration rows, and the other arguments of every block.

    They are in `calibration_dtype(model)`.
    """
    blocks = [model.get_submodule(name) for name in block_names(model)]
    device = model.get_input_embeddings().weight.device
    batches = calibration.batches(batch_tokens)
    try:
        return _record(model, blocks, batches, device, tuples=False)
    except _WrongShape:
        return _record(model, blocks, batches, device, tuples=True)


class _WrongShape(Exception):  # noqa: N818 (caught in this module: blocks of this model return tuples)
    """The second block was given something of another shape than the first."""


def _record(
    model: Any, blocks: Sequence[nn.Module], batches: list[Tensor], device: torch.device, *, tuples: bool
) -> BlockInputs:
    found, dtype = BlockInputs(tuples=tuples), calibration_dtype(model)

    def passing_on(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, named = _split(args, kwargs)
            rest, named = tree_map(_as(dtype), (rest, named))
            if index == 0:
                found.hidden.append(_as(dtype)(hidden.detach()))
                found.others.setdefault(tuple(hidden.shape[:2]), [])
            if not isinstance(hidden, Tensor) or hidden.shape != found.hidden[-1].shape:
                raise _WrongShape
            key = tuple(hidden.shape[:2])
            if len(found.others[key]) == index:
                found.others[key].append((rest, named))
            if index == len(blocks) - 1:
                raise _Stop
            return (hidden,) if tuples else hidden

        return forward

    with _replaced_forwards(blocks, passing_on), torch.no_grad():
        for batch in batches:
            try:
                model.base_model(input_ids=batch.to(device), use_cache=False)
            except _Stop:
                continue
    return found


def _as(dtype: torch.dtype) -> Callable[[Any], Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return cast


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, the positional rest, and the named rest of a block's arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


@contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    for index, block in enumerate(blocks):
        block.forward = make(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def tail_inputs(model: Any, inputs: BlockInputs, head: nn.Module) -> Iterator[Tensor]:
    """What reaches `head` `[B, S, H]` when the blocks have produced `inputs.hidden`."""
    blocks = [model.get_submodule(name) for name in block_names(model)]
    seen: list[Tensor] = []
    for hidden in inputs.hidden:

        def constant(_index: int, hidden: Tensor = hidden) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: (hidden,) if inputs.tuples else hidden

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        handle = head.register_forward_pre_hook(keep)
        hidden = hidden.to(model.dtype)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            with _replaced_forwards(blocks, constant), torch.no_grad():
                model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        yield seen.pop()
