"""What a cache must hold for a model, whichever way transformers says which layers have a window."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import cache_utils

from optimizer.backends.kv_layout import probe
from optimizer.backends.paged_cache import register
from tests.backends.decoder_models import mistral


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 2, ["full_attention", "sliding_attention"]])
@pytest.mark.parametrize("by_layer", [True, False], ids=["transformers 5.23", "transformers 5.17"])
def test_windows_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch, kinds: list[str], by_layer: bool) -> None:
    model = mistral(window=24)
    model.config._attn_implementation = register()
    window: dict[str, Any] = {"sliding_window": 24}
    options = [window if kind == "sliding_attention" else {} for kind in kinds] if by_layer else window
    monkeypatch.setattr(cache_utils, "get_layer_types_and_kwargs", lambda _config: (kinds, options))
    assert [layer.window for layer in probe(model).layers] == [24 * (kind == "sliding_attention") for kind in kinds]
