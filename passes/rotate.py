"""Rotate the residual stream and the values of every head, exactly: outliers spread out, the logits stay.

QuaRot (https://arxiv.org/abs/2404.00456) and SpinQuant (https://arxiv.org/abs/2405.16406): RMSNorm without a weight
commutes with a rotation, so one can be carried through a whole pre-norm decoder by folding it into the weights. With
`Q [H, H]` for the stream, `R [D, D]` for a head of width D, weights `[N, K]` and the norm's weight `g [H]` (Gemma's
is `1 + g`):

    embedding             E      →  E Q
    reads the stream      W      →  W diag(g) Q     q, k, v, gate, up, routers, the head; g becomes 1
    writes the stream     W, b   →  Qᵀ W, Qᵀ b      o, down
    values of one head    W, b   →  Rᵀ W, Rᵀ b      rows of v
    outputs of one head   W      →  W R             columns of o, for each query head

Everything is computed in float64 and rounded once to the type of the weight. Worked example, H = 2: `x = [8, 0.4]`,
`W = [[1, 2]]`, `y = 8.8`. With `Q = [[a, a], [-a, a]]`, `a = √½`, `x Q = [5.37, 5.94]` and `W Q = [[-0.71, 2.12]]`:
again `y = 8.8`, and the largest entry that a quantizer of activations meets is a third smaller.

A head tied to the embedding is untied where the last norm has a weight: the one is `E Q`, the other `E diag(g) Q`.
`rotate_block`, `rotate_embedding` and `rotate_head` need only the modules they are given, so a model can be rotated a
block at a time. They replace modules; no tensor is written to.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimizer.backends.linear import weight_bytes
from optimizer.errors import ModelError, PassError, RecipeError
from optimizer.passes.base import Context, PassReport, Skip, stopwatch, view
from optimizer.quant.hadamard import Rotation, rotation

_MLP = r"mlp\.(?:experts\.\d+\.|shared_expert\.)?"
READS = {
    "input_layernorm": r"self_attn\.(?:q|k|v|qkv)_proj\.weight",
    "post_attention_layernorm": (
        rf"{_MLP}(?:gate|up|gate_up)_proj\.weight|mlp\.(?:gate|shared_expert_gate)\.weight|mlp\.experts\.gate_up_proj"
    ),
}
"""The norms of a block, each with the tensors that multiply its output."""
WRITES = rf"self_attn\.o_proj\.(?:weight|bias)|{_MLP}down_proj\.(?:weight|bias)|mlp\.experts\.down_proj"
"""Tensors whose output is added to the residual stream."""
KEEPS = rf"self_attn\.(?:q|k|v|qkv)_proj\.bias|self_attn\.[qk]_norm\.weight|{_MLP}(?:gate|up|gate_up)_proj\.bias"
"""Tensors that see the stream only through one of the above."""
HEADS = r"self_attn\.(?:(?:q|k|v|qkv|o)_proj\.(?:weight|bias)|[qk]_norm\.weight)"
"""All that an attention may hold if nothing is to act on the values between `v` and `o`."""

_PART = 2**24
"""Weights widened to float64 at a time."""


@dataclass(frozen=True)
class Rotate:
    """Fold Hadamard rotations with random signs into the model: `residual` for the stream, `heads` for the values."""

    name: ClassVar[str] = "rotate"
    stored: ClassVar[bool] = True
    residual: bool = True
    heads: bool = True
    seed: int = 0
    required: bool = True

    def __post_init__(self) -> None:
        if not (self.residual or self.heads):
            raise RecipeError("rotate with residual: false and heads: false rotates nothing. Leave it out.")

    def check(self, model: nn.Module, ctx: Context) -> None:
        """`ModelError` for a model in which a rotation asked for is not exact, unless the pass is not required."""
        del ctx
        if self.required and (refusal := self._refusal(model)) is not None:
            raise refusal

    def run(self, model: nn.Module, ctx: Context) -> PassReport:
        """Rotate blocks, embedding and head; `PassError` if the logits then differ by more than rounding explains."""
        if (refusal := self._refusal(model)) is not None:
            if self.required:
                raise refusal
            return PassReport(self.name, 0, skipped=(Skip(type(model).__name__, str(refusal)),))
        blocks, before = decoder_blocks(model), weight_bytes(model)
        with stopwatch() as seconds, torch.no_grad():
            tokens = _tokens(model)
            expected = _logits(model, tokens)
            if not torch.isfinite(expected).all():
                raise ModelError(f"{type(model).__name__} gives logits that are not finite. Repair its weights first.")
            tolerance = _tolerance(model, tokens, expected)
            stream = rotation(_width(model), seed=self.seed) if self.residual else None
            turns = {"residual stream": stream} if stream else {}
            for done, block in enumerate(blocks.values()):
                if self.heads:
                    turns["heads"] = head_rotation(block, self.seed)
                rotate_block(block, stream, turns.get("heads"))
                ctx.progress(self.name, done + 1, len(blocks))
            untied = stream is not None and _rotate_ends(model, stream)
            _require_equal(type(model).__name__, expected, _logits(model, tokens), tolerance)
        notes = [f"{what}: {t.n} channels, Hadamard matrix of order {t.block}" for what, t in turns.items()]
        if untied:  # last, since no transaction puts these back
            notes.append(_untie(model))
        return PassReport(
            self.name, len(blocks), len(blocks), notes=tuple(notes), seconds=seconds(),
            bytes_before=before, bytes_after=weight_bytes(model),
        )  # fmt: skip

    def _refusal(self, model: nn.Module) -> ModelError | None:
        """Why this model cannot be rotated as asked; None when it can."""
        try:
            if self.residual:
                check_residual(model)
            if self.heads:
                check_heads(model)
        except ModelError as error:
            return error
        return None


def head_rotation(block: nn.Module, seed: int) -> Rotation:
    """The rotation of one head's width that every head of this block gets."""
    return rotation(int(block.self_attn.head_dim), seed=seed)  # type: ignore[union-attr, arg-type]


def rotate_block(block: nn.Module, stream: Rotation | None, heads: Rotation | None) -> None:
    """Replace the modules of one decoder block by rotated ones: the residual stream, the values of each head, or both.

    `stream` turns the hidden width H, `heads` one head's width D. The block must pass `check_block_residual` and
    `check_block_heads`.
    """
    gains = {name: _gain(block.get_submodule(name)) for name in READS} if stream else {}
    changed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in block.named_parameters():
        gain = next((gains[norm] for norm in gains if re.fullmatch(READS[norm], name)), None)
        columns = stream if gain is not None else None
        rows = stream if stream and re.fullmatch(WRITES, name) else None
        fixed = 0  # leading rows that no head rotation turns: Q and K of a fused projection
        path, _, leaf = name.rpartition(".")
        if heads and path == "self_attn.o_proj" and leaf == "weight":
            columns = heads.repeated(tensor.shape[1] // heads.n)
        if heads and path in ("self_attn.v_proj", "self_attn.qkv_proj"):
            fixed = _value_rows(block, path).start
            rows = heads.repeated((len(tensor) - fixed) // heads.n)
        if columns or rows:
            parts = (tensor[:fixed], tensor[fixed:]) if fixed else (tensor,)
            turns = (None, rows) if fixed else (rows,)
            new = torch.cat([turned(p, gain, columns, r) for p, r in zip(parts, turns, strict=True)])
            changed.setdefault(path, {})[leaf] = new
    for norm in gains:
        changed[norm] = {"weight": _unit(block.get_submodule(norm))}
    for path, tensors in changed.items():
        block.set_submodule(path, _with(block.get_submodule(path), tensors))


def rotate_embedding(embedding: nn.Embedding, stream: Rotation) -> nn.Embedding:
    """The embedding `[V, H]` that puts rotated vectors into the residual stream: `E Q`."""
    rotated: nn.Embedding = _with(embedding, {"weight": turned(embedding.weight, None, stream, None)})
    return rotated


def rotate_head(head: nn.Linear, norm: nn.Module, stream: Rotation) -> tuple[nn.Linear, nn.Module]:
    """The head `[V, H]` that reads the rotated stream, and the last norm without its weight: `W diag(g) Q`, 1."""
    head = _with(head, {"weight": turned(head.weight, _gain(norm), stream, None)})
    return head, _with(norm, {"weight": _unit(norm)})


def turned(weight: Tensor, gain: Tensor | None, columns: Rotation | None, rows: Rotation | None) -> Tensor:
    """`Rᵀ W diag(g) C` for `W [..., N, K]`, or `Rᵀ b` for `b [N]`, in float64 and rounded once to the type of W."""
    if weight.ndim == 3:  # experts
        return torch.stack([turned(expert, gain, columns, rows) for expert in weight])
    across = 0 if rows is None else 1 if columns is None and gain is None else None  # parts that do not mix
    if across is not None and weight.ndim == 2 and weight.numel() > _PART:
        parts = weight.split(max(1, _PART // weight.shape[1 - across]), across)
        return torch.cat([turned(part, gain, columns, rows) for part in parts], across)
    exact = weight.detach().double()
    if gain is not None:
        exact = exact * gain
    if columns is not None:
        exact = columns.apply(exact)
    if rows is not None:
        exact = rows.apply(exact.mT).mT if exact.ndim == 2 else rows.apply(exact)
    return exact.to(weight.dtype, memory_format=torch.contiguous_format)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks of a model by name: what holds a `self_attn`. `ModelError` when there is none."""
    blocks = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "self_attn", None), nn.Module)}
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no decoder block with a self_attn, so rotate does not know where its residual "
            "stream and its heads are. Leave rotate out of the recipe."
        )
    return blocks


def check_heads(model: nn.Module) -> None:
    """`ModelError` unless the values of every head reach `o_proj` by a weighted sum alone."""
    for name, block in decoder_blocks(model).items():
        check_block_heads(name, block)


def check_block_heads(name: str, block: nn.Module) -> None:
    """`ModelError` unless this block's attention is `o(softmax(q, k) v)` with v and o plain linears of whole heads."""
    remedy = "Use heads: false."
    for path, tensor in _tensors(block):
        if path.startswith("self_attn.") and not re.fullmatch(HEADS, path):
            raise ModelError(f"{name}.{path} {list(tensor.shape)} may act between the values and o_proj. {remedy}")
    attention = block.self_attn
    width = getattr(attention, "head_dim", None)
    linears = {n: m for n, m in attention.named_children() if isinstance(m, nn.Linear)}  # type: ignore[union-attr]
    value = "qkv_proj" if "qkv_proj" in linears else "v_proj"
    if not isinstance(width, int) or not {value, "o_proj"} <= linears.keys():
        raise ModelError(
            f"{name}.self_attn ({type(attention).__name__}) needs a head_dim, and nn.Linear layers o_proj and v_proj "
            f"or qkv_proj. Put rotate before the passes that replace them, or: {remedy}"
        )
    inner, query = linears["o_proj"].in_features, linears.get("q_proj")
    rows = _value_rows(block, f"self_attn.{value}")
    if inner % width or len(rows) % width or not rows or inner % len(rows) or (query and query.out_features != inner):
        raise ModelError(
            f"{name}.self_attn: {len(rows)} rows of values and {inner} columns of o_proj are not whole heads of "
            f"{width} with the same number of query heads each. {remedy}"
        )


def check_residual(model: nn.Module) -> None:
    """`ModelError` unless embedding, RMSNorms, linears and head are all that touches the residual stream."""
    norm = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)), None)
    if norm is not None:
        raise ModelError(f"{norm[0]} ({type(norm[1]).__name__}) subtracts a mean, {_WHY}")
    blocks, width = decoder_blocks(model), _width(model)
    for name, block in blocks.items():
        check_block_residual(name, block, width)
    check_norm(*_last_norm(model), width)


def check_block_residual(name: str, block: nn.Module, width: int) -> None:
    """`ModelError` unless every tensor of this block has a known place between its norms and the stream `[H]`."""
    for norm in READS:
        if not isinstance(getattr(block, norm, None), nn.Module):
            raise ModelError(f"{name} has no {norm}, {_WHY}")
        check_norm(f"{name}.{norm}", block.get_submodule(norm), width)
    for path, tensor in _tensors(block):
        if path.removesuffix(".weight") in READS:
            continue
        shape = (*[0] * (2 - tensor.ndim), *tensor.shape)
        reads = any(re.fullmatch(pattern, path) for pattern in READS.values())
        writes = re.fullmatch(WRITES, path) is not None
        if not (reads or writes or re.fullmatch(KEEPS, path)):
            raise ModelError(f"{name}.{path} {list(tensor.shape)} has no known place in a pre-norm block, {_WHY}")
        at = shape[-1] if reads or tensor.ndim == 1 else shape[-2]
        if (reads or writes) and (at != width or not tensor.dtype.itemsize > 1):
            raise ModelError(
                f"{name}.{path} {list(tensor.shape)} {tensor.dtype} is not a plain weight of a stream of {width} "
                "channels. Put rotate before the passes that replace it, or use residual: false."
            )


_WHY = (
    "so rotating the residual stream is not known to be exact. Use residual: false where the heads can be rotated "
    "alone, or leave rotate out of the recipe."
)


def check_norm(name: str, norm: nn.Module, width: int) -> None:
    """`ModelError` unless the module is an RMSNorm over `width` channels, by what it computes and not by its name."""
    parameters = dict(norm.named_parameters())
    if [(n, p.shape) for n, p in parameters.items()] != [("weight", (width,))]:
        raise ModelError(f"{name} ({type(norm).__name__}) is no norm with one weight [{width}], {_WHY}")
    generator = torch.Generator().manual_seed(0)
    x = 1e3 * (torch.randn(4, width, generator=generator) + 1)  # a mean to subtract, and an epsilon that vanishes
    weight = torch.randn(width, generator=generator)
    y = torch.func.functional_call(norm, {"weight": weight}, (x,))
    expected = x * x.square().mean(-1, keepdim=True).rsqrt() * (weight + _offset(norm))
    if not torch.allclose(y, expected, rtol=1e-4, atol=1e-5):
        raise ModelError(f"{name} ({type(norm).__name__}) does not compute x / rms(x) times its weight, {_WHY}")


def _offset(norm: nn.Module) -> int:
    """What the norm adds to its weight: 0, or 1 (Gemma's). With a weight of zeros that is all it multiplies by."""
    x = torch.ones(1, len(norm.weight))  # type: ignore[arg-type]
    with torch.no_grad():
        y = torch.func.functional_call(norm, {"weight": torch.zeros_like(x[0])}, (x,))
    return round(float(y.mean()))


def _gain(norm: nn.Module) -> Tensor:
    """What the norm multiplies each channel by, `[H]` float64."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight.detach().double() + _offset(norm)


def _unit(norm: nn.Module) -> Tensor:
    """The weight with which the norm multiplies by 1."""
    return torch.full_like(norm.weight, 1 - _offset(norm))  # type: ignore[arg-type]


def _value_rows(block: nn.Module, path: str) -> range:
    """The rows of `v_proj`, or of a fused `[Q; K; V]`, that make values."""
    rows = int(block.get_submodule(path).out_features)  # type: ignore[arg-type]
    if path.endswith(".v_proj"):
        return range(rows)
    queries = int(block.get_submodule("self_attn.o_proj").in_features)  # type: ignore[arg-type]
    return range((rows + queries) // 2, rows)


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _with(module: Any, tensors: dict[str, Tensor]) -> Any:
    """The same module with other parameters; the one given keeps its own."""
    clone = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(clone, kind, dict(getattr(module, kind)))
    for name, tensor in tensors.items():
        clone._parameters[name] = nn.Parameter(tensor, requires_grad=module._parameters[name].requires_grad)
    return clone


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _last_norm(model: Any) -> tuple[str, nn.Module]:
    """The norm before the head: what holds parameters and is neither block, embedding nor head."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear head ({type(head).__name__}), {_WHY}")
    known = {*decoder_blocks(model).values(), model.get_input_embeddings(), head}
    inside = {module for owner in known for module in owner.modules()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "nothing"
        raise ModelError(f"one norm should stand between the blocks and the head, not {names}, {_WHY}")
    return found[0]


def _rotate_ends(model: Any, stream: Rotation) -> bool:
    """Rotate embedding, last norm and head; whether a tied head had to get a weight of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name, norm = _last_norm(model)
    tied = head.weight is embedding.weight
    model.set_input_embeddings(rotate_embedding(embedding, stream))
    turned_head, turned_norm = rotate_head(head, norm, stream)
    same = tied and bool((_gain(norm) == 1).all())
    if same:
        turned_head._parameters["weight"] = model.get_input_embeddings().weight
    model.set_output_embeddings(turned_head)
    model.set_submodule(name, turned_norm)
    return tied and not same


def _untie(model: Any) -> str:
    """Say in the model's configuration that its head is no longer its embedding; the note for the report."""
    head = model.get_output_embeddings()
    name = next(n for n, module in model.named_modules() if module is head)
    model.config = copy.deepcopy(model.config)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {key: source for key, source in tied.items() if key != f"{name}.weight"}
    cost = head.weight.numel() * head.weight.element_size()
    return f"{name} is no longer tied to the embedding, for the last norm's weight is folded into it: {cost} bytes more"


def _tokens(model: Any) -> Tensor:
    """Random tokens `[16, 4]` to compare logits on: many short rows, for an error of one token stays in its row."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, len(table), (16, 4), generator=generator).to(table.device)


def _logits(model: nn.Module, tokens: Tensor, *, jitter: bool = False) -> Tensor:
    """Logits `[B, S, V]` in float32, whatever the model's type; one layer at a time is widened while it runs.

    With `jitter` every matrix is off by as much as rounding it to its type once more would make it.
    """
    wide = view(model).eval()
    generator = torch.Generator(tokens.device).manual_seed(0)
    for module in wide.modules():
        if module._parameters:
            stored = module._parameters
            module.register_forward_pre_hook(lambda m, _: _widen(m, generator if jitter else None))
            module.register_forward_hook(lambda m, *_, stored=stored: m.__setattr__("_parameters", stored))
    logits: Tensor = wide(tokens, use_cache=False).logits
    return logits.float()


def _widen(module: nn.Module, generator: torch.Generator | None) -> None:
    wide = dict(module._parameters)
    for name, p in module._parameters.items():
        if p is None:
            continue
        exact = p if p.dtype.itemsize > 4 else p.float()
        if p.ndim > 1 and generator is not None:
            # Rounding errs by up to half an eps of the power of two below: root mean square 0.2 eps, uniform ±0.35 eps.
            reach = 0.35 * torch.finfo(p.dtype).eps
            exact = exact * torch.empty_like(exact).uniform_(1 - reach, 1 + reach, generator=generator)
        wide[name] = exact  # type: ignore[assignment]
    module._parameters = wide


def _tolerance(model: nn.Module, tokens: Tensor, expected: Tensor) -> float:
    """The relative difference of logits that rounding may make: four times what a rounding of every weight does make.

    Measured, for it depends on the model: routers that waver between experts enlarge it much. Not below what float32
    costs, up to √H eps for a product over H channels and growing with the root of the blocks: eight times that. And
    not above a half, beyond which unlike logits are not told from like ones.
    """
    floor = 8 * torch.finfo(torch.float32).eps * (_width(model) * (len(decoder_blocks(model)) + 1)) ** 0.5
    return min(float(floor) + 4 * difference(expected, _logits(model, tokens, jitter=True)), 0.5)


def difference(expected: Tensor, logits: Tensor) -> float:
    """Lower quartile over tokens of `‖Δ‖ / ‖logits - mean‖`.

    What is wrong with a rotation is wrong for every token. A router that wavers between two experts changes one token
    much, and those after it, and may do so in one of two equally good models.
    """
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((logits - expected).norm(dim=-1) / spread).detach().quantile(0.25))


def _require_equal(name: str, expected: Tensor, logits: Tensor, tolerance: float) -> None:
    found = difference(expected, logits)
    if not found <= tolerance:
        raise PassError(
            f"rotate changed the logits of {name} by {found:.2g} (relative, {expected[..., 0].numel()} random "
            f"tokens); rounding explains {tolerance:.2g}. The model holds something that does not commute with a "
            "rotation: try residual: false or heads: false, or leave rotate out of the recipe."
        )
