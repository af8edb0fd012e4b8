import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from benchmarks import peers_quality
from benchmarks.peers import llm_compressor as peer
from benchmarks.peers_quality import LENGTH, OURS, PAIRS, Pair, agreed, compare, keep_activations, markdown, worse
from optimizer.backends.linear import QuantizedLinear
from optimizer.passes.registry import build_pass
from optimizer.quant.formats import ACTIVATIONS, Format
from optimizer.quant.rtn import quantize_rtn
from tests.optimizer.tiny_models import llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported job: two tiny models and some tokens."""
    path = tmp_path_factory.mktemp("job")
    for seed, name in enumerate(peer.MODELS):
        llama(seed=seed).save_pretrained(path / "models" / name)
    tokens = torch.randint(0, 320, (peer.BATCH + 3, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration": tokens[:2].clone(), "windows": tokens}, path / "data.safetensors")
    return path


def ran(folder, scheme):
    peer.run(peer.Side("ours", ("torch",), peers_quality.prepare, keep_activations), folder, scheme)
    facts = json.loads((folder / f"ours-{scheme}.json").read_text())
    return facts, load_file(folder / f"ours-{scheme}.safetensors")


def facts(likelihoods, effect=1.0):
    models = {name: {"seconds": 1.0, "cpu_seconds": 1.0, "activation_effect": effect} for name in peer.MODELS}
    process = {"seconds": 9.0, "peak_bytes": 2 << 20, "step_bytes": 1 << 20, "threads": 1}
    return {"models": models, "process": process, "likelihoods": dict.fromkeys(peer.MODELS, likelihoods)}


BASE = -torch.linspace(500.0, 900.0, 8, dtype=torch.float64)
BASES = dict.fromkeys(peer.MODELS, BASE)


def test_every_pair_names_a_scheme_of_each_side_that_can_be_built():
    for pair in PAIRS:
        assert pair.theirs in peer.RECIPES
        steps = [build_pass("quantize", options) for options in OURS[pair.ours]]
        assert pair.activations == any(step.scheme.activation is not None for step in steps)


def test_the_script_for_the_peer_needs_nothing_but_the_standard_library_to_be_imported():
    tree = ast.parse(Path(peer.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in imports]
    assert not {"optimizer", "benchmarks"} & set(named)
    first = {name for name, node in zip(named, imports, strict=True) if node.col_offset == 0}
    assert "torch" in named
    assert first <= sys.stdlib_module_names


def test_unquantized_models_are_evaluated_as_cross_entropy_says(folder):
    facts, found = ran(folder, "none")
    windows = load_file(folder / "data.safetensors")["windows"]
    for name in peer.MODELS:
        model = LlamaForCausalLM.from_pretrained(folder / "models" / name, dtype=torch.float32)
        with torch.no_grad():
            logits = model(windows).logits[:, :-1].double()
        exact = -cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").sum(1)
        torch.testing.assert_close(found[name], exact, rtol=1e-6, atol=0)
        assert facts["models"][name]["activation_effect"] == 0
    assert 0 <= facts["process"]["step_bytes"] <= facts["process"]["peak_bytes"]
    assert facts["process"]["seconds"] > 0


@pytest.mark.parametrize(("scheme", "rounds"), [("int8-rtn", False), ("w8a8-naive", True)])
def test_the_effect_of_rounded_activations_is_seen_where_there_is_one(folder, scheme, rounds):
    facts, found = ran(folder, scheme)
    base = ran(folder, "none")[1]
    for name in peer.MODELS:
        assert (facts["models"][name]["activation_effect"] > 0) == rounds
        assert not torch.equal(found[name], base[name])


def test_ratios_are_paired_and_ours_over_theirs():
    row = compare(Pair("a", "b"), facts(BASE - 5), facts(BASE - 5 - 0.003 * (LENGTH - 1)), BASES)
    ratio = row["models"]["plain"]["ours_over_theirs"]
    assert ratio["value"] == pytest.approx(torch.tensor(0.003).exp().item())
    assert ratio["low"] == pytest.approx(ratio["high"])  # the same loss in every window, however hard the window
    assert [line.split(":")[0] for line in worse([row])] == [f"Worse than theirs, {name}" for name in peer.MODELS]
    assert not worse([compare(Pair("a", "b"), facts(BASE - 5), facts(BASE - 5), BASES)])


def test_activations_that_are_not_rounded_are_a_failure_that_the_table_shows():
    row = compare(Pair("a", "b", activations=True), facts(BASE, effect=0.0), facts(BASE), BASES)
    assert row["failed"] == "theirs: activations are not rounded in plain, outliers"
    assert "failed" not in compare(Pair("a", "b"), facts(BASE, effect=0.0), facts(BASE), BASES)


def test_a_process_that_fails_is_reported_with_its_last_line(folder):
    failed = peers_quality.measure(folder, "theirs", "none", [sys.executable, "-c", "raise OSError('no such thing')"])
    assert failed == {"failed": "OSError: no such thing"}
    row = compare(Pair("a", "b"), failed, facts(BASE), BASES)
    document = {
        "unquantized": {"plain": 30.0}, "rows": [row, compare(Pair("c", "d"), facts(BASE), facts(BASE), BASES)],
        "versions": {"theirs": {"x": "1"}, "ours": {"y": "2"}}, "machine": "m", "threads": 1, "tokens": 7,
        "calibration_rows": 8, "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    table = [line for line in markdown(document).splitlines() if line.startswith("|")]
    assert "failed: theirs: OSError: no such thing" in table[2]
    assert "1.0000 [1.0000, 1.0000]" in table[3]
    assert len({line.count("|") for line in table}) == 1


def test_sides_that_disagree_on_the_unquantized_model_are_refused():
    assert torch.equal(agreed(facts(BASE * (1 + 1e-7)), facts(BASE))["plain"], BASE)
    for theirs in (facts(BASE * (1 + 1e-4)), facts(BASE * torch.nan), {"failed": "no torch"}):
        with pytest.raises(SystemExit):
            agreed(theirs, facts(BASE))


def test_our_layers_stop_rounding_their_inputs():
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear(quantize_rtn(weight, Format(8, True, -1), torch.float32), None, ACTIVATIONS["int8"])
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    exact = x @ layer.stored_weight().dequantize().T
    assert not torch.allclose(layer(x), exact, rtol=1e-5, atol=1e-5)
    keep_activations(layer)
    torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-5)


def test_the_page_shows_the_committed_result():
    root = Path(__file__).resolve().parents[1]
    document = json.loads((root / "benchmarks/results/peers_quality.json").read_text(encoding="utf-8"))
    assert (root / "docs/peers.md").read_text(encoding="utf-8") == peers_quality.page(document)
