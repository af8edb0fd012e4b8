"""Train the embedded reference model: a small Llama on the source of the Python standard library.

    python evals/reference/train.py --out evals/reference/model --steps 660

Architecture: Llama (GQA, RMSNorm, SwiGLU, RoPE, tied embeddings), 11.0 M parameters, byte-level BPE of 4096
tokens. Trained in float32 from a fixed seed, saved in bfloat16. Matrices are updated by Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), whose Newton-Schulz step is kept in float32 because few CPUs multiply
bfloat16 fast; everything else by AdamW. A killed run continues from `--checkpoint`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from corpus import held_out_files, read, training_files
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
# Letters with one leading mark, short numbers, punctuation, and newlines apart from the indentation after them.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTEXT = 512


def train_tokenizer(texts: list[str], size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` entries; every byte string round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=2048,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def config() -> LlamaConfig:
    """The architecture: every matrix dimension is a multiple of 128, as fast kernels want."""
    return LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents as one row of token ids `[T]`, each begun by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (0, *row)], dtype=torch.long)


def orthogonalize(gradient: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, by five quintic Newton-Schulz iterations. `[N, K]` in, `[N, K]` out."""
    x = gradient.mT if gradient.size(0) > gradient.size(1) else gradient
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if gradient.size(0) > gradient.size(1) else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices inside the decoder layers."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(buffer, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1.0, weight.size(0) / weight.size(1)) ** 0.5)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a short warm-up, a plateau, then a straight line to zero over the last half."""
    return min(1.0, (step + 1) / 30, (steps - step) / (0.5 * steps))


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Mean negative log-likelihood (nats a token) of `tokens [T]` in windows of `CONTEXT`."""
    windows = tokens[: (tokens.numel() - 1) // CONTEXT * CONTEXT + 1]
    inputs, targets = windows[:-1].view(-1, CONTEXT), windows[1:].view(-1, CONTEXT)
    total = 0.0
    for x, y in zip(inputs.split(8), targets.split(8), strict=True):
        logits = model(x).logits.float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
    return total / targets.numel()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    texts = read(training_files())
    tokenizer = train_tokenizer(texts)
    tokens, held_out = stream(tokenizer, texts), stream(tokenizer, read(held_out_files()))
    model = LlamaForCausalLM(config())
    scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for layer in model.model.layers:  # residual branches start small, as in GPT-2
        layer.self_attn.o_proj.weight.data.mul_(scale)
        layer.mlp.down_proj.weight.data.mul_(scale)
    both = optimizers(model)
    peaks = [group["lr"] for optimizer in both for group in optimizer.param_groups]
    first, began, checkpoint = 0, time.time(), Path(args.checkpoint)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    print(f"{tokens.numel():,} training tokens, {held_out.numel():,} held out, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)  # fmt: skip
    for step in range(first, args.steps):
        for group, peak in zip((g for o in both for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * schedule(step, args.steps)
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(tokens.numel() - CONTEXT - 1, (args.batch,), generator=draw)
        rows = torch.stack([tokens[s : s + CONTEXT + 1] for s in starts])
        loss = torch.zeros(())
        for part in rows.split(args.micro):
            logits = model(part[:, :-1]).logits
            piece = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            piece = piece / (args.batch * CONTEXT)
            piece.backward()
            loss += piece.detach()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == args.steps - 1:
            done = step - first + 1
            rate = done * args.batch * CONTEXT / (time.time() - began)
            print(f"step {step} loss {loss:.4f} {rate:.0f} tok/s {time.time() - began:.0f} s", flush=True)
        if (step + 1) % 100 == 0 or step == args.steps - 1:
            print(f"step {step} held-out {loss_on(model, held_out[:65537]):.4f}", flush=True)
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": [o.state_dict() for o in both]},
                       checkpoint)  # fmt: skip
    export(model, tokenizer, Path(args.out), held_out, args)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, held_out: Tensor, args: Any) -> None:
    """Write the bfloat16 checkpoint and tokenizer, and the held-out figures reached."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    nats = loss_on(model.to(torch.float32), held_out)
    figures = {"held_out_nats_per_token": nats, "held_out_perplexity": math.exp(nats), "steps": args.steps,
               "tokens_seen": args.steps * args.batch * CONTEXT, "seed": args.seed}  # fmt: skip
    (out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="evals/reference/model")
    parser.add_argument("--checkpoint", default="reference-checkpoint.pt")
    parser.add_argument("--steps", type=int, default=660)
    parser.add_argument("--batch", type=int, default=12, help="sequences of 512 tokens a step")
    parser.add_argument("--micro", type=int, default=6, help="sequences at a time, to bound memory")
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())
