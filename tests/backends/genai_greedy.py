"""Greedy tokens by onnxruntime-genai's own API; run by its own Python, and imports nothing of ours.

    python genai_greedy.py FOLDER < {"prompts": [[1, 2], [3]], "new": 8, "pad": 0}

Answers the new tokens of each prompt as JSON. Prompts of different lengths run as one batch, padded on the right.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    asked = json.load(sys.stdin)
    prompts, new = asked["prompts"], asked["new"]
    longest = max(map(len, prompts))
    model = og.Model(sys.argv[1])
    params = og.GeneratorParams(model)
    total = longest + new
    params.set_search_options(max_length=total, min_length=total, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([row + [asked["pad"]] * (longest - len(row)) for row in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [[int(token) for token in generator.get_sequence(row)[longest:]] for row in range(len(prompts))]
    json.dump({"tokens": found, "version": og.__version__}, sys.stdout)


if __name__ == "__main__":
    main()
