"""Every architecture through every algorithm; `docs/architectures.md` is the table that this makes.

python -m tests.passes.test_architectures    # writes it again
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.backends.linear import QuantizedLinear
from optimizer.errors import PassError, RecipeError, UsageError
from optimizer.passes.base import Context, PassReport, transaction, view
from optimizer.passes.blocks import block_names
from optimizer.passes.calibration import Calibration
from optimizer.passes.linearize import linearize
from optimizer.passes.quantize import Quantize
from optimizer.quant.rtn import quantize_rtn
from tests.passes.small_architectures import ARCHITECTURES

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
INT4: dict[str, Any] = {"bits": 4, "group_size": 32}
METHODS: dict[str, dict[str, Any]] = {
    "RTN": INT4 | {"clip": "mse"},
    "AWQ": INT4 | {"method": "awq", "symmetric": False},
    "GPTQ": INT4 | {"method": "gptq"},
    "SmoothQuant": {"activations": "int8", "smooth": True},
    "W8A8": {"activations": "int8"},
    "LLM.int8": {"activations": "llm-int8"},
    "W4A8": INT4 | {"activations": "int8", "method": "gptq", "smooth": True},
    "FP8": {"weights": "fp8", "activations": "fp8"},
    "FP8 static": {"weights": "fp8-tensor", "activations": "fp8-static"},
    "FP8 block": {"weights": "fp8-block", "activations": "fp8"},
    "NVFP4": {"weights": "nvfp4", "activations": "nvfp4", "method": "gptq"},
    "MXFP4": {"weights": "mxfp4"},
}
WORST = 0.6
"""Relative change of the logits that 4 bits may cause in a model of random weights; a wrong layer changes them by 1."""


def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(tuple(torch.randint(3, 300, (64,), generator=generator) for _ in range(16)))


def quantize(model: Any, options: dict[str, Any]) -> tuple[Any, PassReport]:
    step, context = Quantize(**options), Context(calibration=calibration())
    copy = view(model)
    step.check(copy, context)
    with transaction(copy):
        return copy, step.run(copy, context)


@torch.no_grad()
def change(model: Any, copy: Any) -> float:
    """How far the logits of a quantized copy are from the model's, `‖Δ‖ / ‖logits‖` on other tokens."""
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    exact, rounded = (m(input_ids=tokens, use_cache=False).logits for m in (model, copy))
    assert bool(torch.isfinite(rounded).all())
    return float((exact - rounded).norm() / exact.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_quantized_and_the_model_stays_near(name: str, method: str) -> None:
    model = ARCHITECTURES[name]()
    before = {key: value.detach().clone() for key, value in model.state_dict().items()}
    copy, report = quantize(model, METHODS[method])
    inside = [n for n, m in copy.named_modules() if isinstance(m, QuantizedLinear)]
    assert report.matched == report.expected == len(inside) == len(report.layers)
    left = {skip.name for skip in report.skipped}
    assert not [n for n, m in copy.named_modules() if isinstance(m, torch.nn.Linear) and n not in left]
    assert 0 < change(model, copy) < WORST
    if Quantize(**METHODS[method]).calibrates:
        assert all(layer.tokens for layer in report.layers)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_gptq_loses_less_of_the_output_than_rounding(name: str) -> None:
    # In the first block, whose inputs are the model's own; the outputs are multiplied out, not taken from a Gram.
    model = ARCHITECTURES[name]()
    plain = view(model)
    linearize(plain)
    inputs: dict[str, list[torch.Tensor]] = {}
    for path, layer in plain.get_submodule(block_names(plain)[0]).named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _m, args, path=path: inputs.setdefault(path, []).append(args[0]))
    for batch in calibration().batches():
        plain(input_ids=batch, use_cache=False)
    solved, _ = quantize(model, INT4 | {"method": "gptq"})
    lost = {"gptq": 0.0, "rtn": 0.0}
    for path, seen in inputs.items():
        x = torch.cat([part.flatten(0, -2) for part in seen])
        weight: Any = plain.get_submodule(f"{block_names(plain)[0]}.{path}").weight
        layer: Any = solved.get_submodule(f"{block_names(plain)[0]}.{path}")
        rounded = quantize_rtn(weight, layer.format).dequantize()
        size = (x @ weight.T).norm()
        lost["gptq"] += float((x @ (weight - layer.stored_weight().dequantize()).T).norm() / size)
        lost["rtn"] += float((x @ (weight - rounded).T).norm() / size)
    assert lost["gptq"] < 0.9 * lost["rtn"]


def test_an_expert_that_saw_no_token_is_an_error_with_a_remedy() -> None:
    model = ARCHITECTURES["mixtral"]()
    few = Context(calibration=Calibration((torch.tensor([5, 5]),)))
    options = INT4 | {"method": "gptq"}
    with pytest.raises(PassError, match=r"experts\.\d+\.\w+ saw no token .*unrouted: rtn"):
        Quantize(**options).run(view(model), few)
    copy = view(model)
    report = Quantize(**options, unrouted="rtn").run(copy, few)
    rounded = [layer for layer in report.layers if not layer.tokens]
    assert rounded
    assert {layer.method for layer in rounded} == {"rtn"}
    noted = [note for note in report.notes if "no calibration token reached it" in note]
    assert sum(int(re.search(r"(?:\((\d+)×\))?$", note)[1] or 1) for note in noted) == len(rounded)  # type: ignore[index]


def test_calibration_is_asked_for_before_any_work() -> None:
    for options in ({"method": "gptq"}, {"activations": "int8", "smooth": True}, {"activations": "int8-static"}):
        with pytest.raises(RecipeError, match="needs calibration data"):
            Quantize(**options).check(ARCHITECTURES["llama"](), Context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gtpq"}, r"quantize\.method is 'gtpq'. Use one of rtn, awq, gptq"),
        ({"weights": "fp9"}, r"quantize\.weights is 'fp9'"),
        ({"activations": "int4"}, r"quantize\.activations is 'int4'"),
        ({"smooth": True}, "serves rounded activations"),
        ({"smooth": True, "method": "awq", "activations": "int8"}, "both choose the channels' scales"),
        ({"alpha": 0.5}, "strength of smooth: true"),
        ({"weights": "fp8", "bits": 4}, "fixes bits"),
        ({"symmetric": False, "activations": "int8"}, "symmetric weights only"),
        ({"damp": 0.0}, "Invalid damp"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, UsageError), match=message):
        Quantize(**options)


def table() -> str:
    """`docs/architectures.md`: what is quantized, and where scales fold, found by running each architecture."""
    lines = [
        "# Architectures",
        "",
        "Small random models of each architecture, two blocks each, go through every algorithm:",
        ", ".join(METHODS) + ".",
        "The table is made by `python -m tests.passes.test_architectures` and kept true by that test.",
        "",
        "| architecture | layers quantized | scales fold at (a block) | no scale folds at | left as they are |",
        "|---|---|---|---|---|",
    ]
    for name, build in ARCHITECTURES.items():
        model = build()
        reports = [quantize(model, options)[1] for options in METHODS.values()]
        counts = {report.matched for report in reports}
        assert len(counts) == 1
        awq = reports[list(METHODS).index("SmoothQuant")]
        first, second = (f"{name}." for name in block_names(model)[:2])
        any_block = re.sub(r"\.0\.$", ".*.", first)
        sites = [note.removeprefix(any_block).removeprefix(first).partition(": ") for note in awq.notes if ": " in note]
        folded = dict.fromkeys(site for site, _, what in sites if "smoothed" in what and not site.startswith(second))
        refused = dict.fromkeys(site for site, _, what in sites if "no scale" in what and not site.startswith(second))
        left = sorted({skip.name.replace(first, "….") for skip in awq.skipped if not skip.name.startswith(second)})
        lines.append(
            f"| {name} | {counts.pop()} | {_listed(list(folded))} | {_listed(list(refused))} | {_listed(left)} |"
        )
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    experts = [name for name in names if ".experts." in name]
    kept = [f"`{name}`" for name in names if name not in experts]
    return ", ".join(kept + ([f"{len(experts)} in its experts"] if experts else [])) or "–"


def test_the_table_in_the_docs_is_what_was_found() -> None:
    assert TABLE.read_text(encoding="utf-8") == table()


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
