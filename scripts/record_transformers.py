"""Record what `transformers` computes for the fixture checkpoints: log-probabilities and greedy tokens.

    python -m venv torch-env && torch-env/bin/pip install torch transformers safetensors
    torch-env/bin/python scripts/record_transformers.py [--only NAME]

torch is no dependency of the project: this script runs in an environment of its own and imports nothing of the project.
Each float32 fixture in tests/fixtures/models gets tests/fixtures/recorded/NAME.npz with, for prompt i:
  tokens_i     int32[len]       the prompt, random ids
  positions_i  int32[p]         recorded positions, the last of the prompt among them
  top_ids_i    int32[p, TOP]    most likely next tokens there, best first
  top_i        float32[p, TOP]  their log-probabilities
  next_i       float32[p]       log-probability of the token that does follow (the greedy one after the last)
  greedy_i     int32[GREEDY], greedy_logprobs_i, greedy_margins_i   the greedy continuation, top-1 minus top-2
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

LENGTHS = (5, 16, 63, 250, 1000, 2500, 6000)
OTHER_LENGTHS = (5, 63, 250, 1000, 2500)  # of the families and rope kinds beside plain Llamas
PLAIN = ("gqa", "mha", "tied", "rope3")
POSITIONS, TOP, GREEDY = 48, 8, 16
FIXTURES = Path(__file__).parents[1] / "tests/fixtures"


def record_prompt(model, tokens: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(torch.from_numpy(tokens[None].astype(np.int64)), use_cache=True)
        logprobs = torch.log_softmax(out.logits[0].float(), dim=-1)
        top = torch.topk(logprobs[positions], TOP)
        greedy, values, margins, last = [], [], [], logprobs[-1]
        for _ in range(GREEDY):
            best = torch.topk(last, 2)
            greedy.append(int(best.indices[0]))
            values.append(float(best.values[0]))
            margins.append(float(best.values[0] - best.values[1]))
            out = model(torch.tensor([[greedy[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            last = torch.log_softmax(out.logits[0, -1].float(), dim=-1)
    following = np.append(tokens[1:], greedy[0])[positions]
    return {
        "tokens": tokens.astype(np.int32),
        "positions": positions.astype(np.int32),
        "top_ids": top.indices.numpy().astype(np.int32),
        "top": top.values.numpy(),
        "next": logprobs[positions, torch.from_numpy(following.astype(np.int64))].numpy(),
        "greedy": np.array(greedy, np.int32),
        "greedy_logprobs": np.array(values, np.float32),
        "greedy_margins": np.array(margins, np.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only")
    arguments = parser.parse_args()
    for directory in sorted((FIXTURES / "models").iterdir()):
        config = json.loads((directory / "config.json").read_text())
        if config["torch_dtype"] != "float32" or arguments.only not in (None, directory.name):
            continue
        plain = directory.name in PLAIN
        kind = "sdpa" if plain else "eager"  # only the latter knows soft-caps
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=kind).eval()
        recorded = {}
        for i, length in enumerate(LENGTHS if plain else OTHER_LENGTHS):
            rng = np.random.default_rng(length)
            tokens = rng.integers(3, config["vocab_size"], length)
            positions = np.unique(np.append(rng.integers(0, length, POSITIONS), length - 1))
            recorded |= {f"{key}_{i}": value for key, value in record_prompt(model, tokens, positions).items()}
        np.savez_compressed(FIXTURES / "recorded" / f"{directory.name}.npz", **recorded)
        print(f"recorded {directory.name}", flush=True)


if __name__ == "__main__":
    main()
