"""Make the fixture checkpoints of the tests: small Llamas in which no KV token can go wrong unseen.

    python scripts/make_fixtures.py [--only NAME] [--out tests/fixtures/models]

Ordinary random weights hide KV bugs: over thousands of tokens attention averages values out, and a lost token moves
nothing. Here every layer is calibrated on a probe prompt, so that two kinds of heads alternate (each KV head
serves both):

* local heads score by distance: one constant lane of the residual (lane 0, which no layer writes) feeds the same vector
  into all queries and keys, and rotation turns it into a bump at distance 0. So the last tokens of a prompt matter too,
  and a key rotated by one position too many moves its score.
* far heads score by content, with standard deviation `FAR_SCORES`: every query weighs the past differently, so outputs
  of different queries do not become alike (which near-uniform attention causes, and which hides tokens a layer later),
  and a large output gain makes the sum, not the residual, speak: hiding one of N tokens turns it by 1 / sqrt(N).

The gains also keep the model from chaos: scores stay of order 10, so the noise of another order of summation (1e-7 a
step) reaches the log-probabilities as a few 1e-5. `tests/loong_jax/model/test_fixture_power.py` measures both.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import msgspec
import numpy as np

from loong_jax.config import ModelConfig, RopeConfig
from loong_jax.model.decoder import Params, decode_stack, init_params
from loong_jax.model.default_model import train_tokenizer
from loong_jax.model.export import save_checkpoint
from loong_jax.model.layers import rms_norm
from loong_jax.model.oracle import causal_attention
from loong_jax.model.rope import rope_frequencies

PROBE_TOKENS = 2048
CONSTANT = 32.0  # value of lane 0 in every embedding; the other lanes have unit variance
LOCAL_SCORES, LOCAL_BUMP = 0.5, 20.0  # standard deviation by content; height of the bump at distance 0
FAR_SCORES = 1.25
LOCAL_SHARE, FAR_SHARE, FFN_SHARE = 0.6, 0.8, 0.5  # what a layer adds to the residual, in units of the embedding
LOGITS = 3.0  # standard deviation of the logits

LLAMA = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position=16384,
    bos_id=0,
    eos_ids=(1,),
)
ROPE3 = RopeConfig(
    500_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=1024
)


class Fixture(msgspec.Struct, frozen=True):
    config: ModelConfig
    seed: int
    num_files: int = 1


FIXTURES = {
    "gqa": Fixture(msgspec.structs.replace(LLAMA, rope=RopeConfig(1000.0)), 0),
    "mha": Fixture(msgspec.structs.replace(LLAMA, num_layers=2, num_kv_heads=4, norm_eps=1e-6), 1),
    "tied": Fixture(msgspec.structs.replace(LLAMA, vocab_size=509, tie_embeddings=True, eos_ids=(1, 2)), 2),
    "rope3": Fixture(msgspec.structs.replace(LLAMA, rope=ROPE3, head_dim=64, num_layers=2), 3, num_files=3),
    "bf16": Fixture(msgspec.structs.replace(LLAMA, dtype="bfloat16", head_dim=64, num_layers=2), 4),
}


def probe_tokens(vocab_size: int, num_tokens: int = PROBE_TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocab_size, num_tokens).astype(np.int32)


def calibrated_params(config: ModelConfig, seed: int) -> Params:
    """Float32 parameters with power. Heads of even index are local, of odd index far."""
    config = msgspec.structs.replace(config, dtype="float32")
    rng = np.random.default_rng(seed)
    params = _to_numpy(init_params(config, seed))
    params["embed"] *= config.hidden_size**0.5
    params["embed"][:, 0] = CONSTANT
    if not config.tie_embeddings:
        params["lm_head"][:, 0] = 0.0
    for layer in range(config.num_layers):
        _calibrate_layer(params, config, layer, rng)
    params["final_norm"] = _norm_weights(rng, config.hidden_size)
    params["final_norm"][0] = 0.0  # a tied head would add the constant to all logits
    hidden = rms_norm(
        jnp.asarray(_residual(params, config, config.num_layers)), jnp.asarray(params["final_norm"]), config.norm_eps
    )
    params["final_norm"] *= LOGITS / np.std(hidden @ params["embed" if config.tie_embeddings else "lm_head"].T)
    return params


def _to_numpy(params: Params) -> Params:
    layers = [{name: np.array(leaf) for name, leaf in layer.items()} for layer in params["layers"]]
    return {name: layers if name == "layers" else np.array(leaf) for name, leaf in params.items()}


def _norm_weights(rng: np.random.Generator, size: int) -> np.ndarray:
    """Far enough from one that a forgotten norm weight shows; one in the constant lane."""
    weights = rng.uniform(0.6, 1.4, size).astype(np.float32)
    weights[0] = 1.0
    return weights


def _residual(params: Params, config: ModelConfig, num_layers: int) -> np.ndarray:
    """Hidden states of the probe after the first `num_layers` layers."""
    tokens = probe_tokens(config.vocab_size)
    cut = {**params, "layers": params["layers"][:num_layers]}
    attend = lambda carry, layer, q, k, v: (causal_attention(q, k, v), carry)
    return np.asarray(decode_stack(cut, config, jnp.asarray(tokens), jnp.arange(len(tokens)), attend, None)[0])


def _calibrate_layer(params: Params, config: ModelConfig, layer: int, rng: np.random.Generator) -> None:
    weights, dim, num_heads = params["layers"][layer], config.head_dim, config.num_heads
    weights["attn_norm"], weights["ffn_norm"] = (_norm_weights(rng, config.hidden_size) for _ in range(2))
    for name in ("qkv", "gate_up"):
        weights[name][0] = 0.0
    for name in ("o", "down"):
        weights[name][:, 0] = 0.0
    _clear_bump_lanes(weights["qkv"], config)
    before = _residual(params, config, layer)
    normed = np.asarray(rms_norm(jnp.asarray(before), jnp.asarray(weights["attn_norm"]), config.norm_eps))
    local = np.arange(num_heads) % 2 == 0

    # Content scores: queries of every head to the deviation of its kind.
    fused = (normed @ weights["qkv"]).reshape(len(normed), -1, dim)
    q, k = fused[:, :num_heads], fused[:, num_heads : num_heads + config.num_kv_heads]
    for head in range(num_heads):
        scores = q[:: PROBE_TOKENS // 256, head] @ k[:, head * config.num_kv_heads // num_heads].T * dim**-0.5
        wanted = LOCAL_SCORES if local[head] else FAR_SCORES
        weights["qkv"][:, head * dim : (head + 1) * dim] *= wanted / scores.std()
    _add_bump(weights["qkv"], config, local, float(np.mean(normed[:, 0] ** 2)))

    # Gains: what each kind of head, then the FFN, adds to the residual.
    o, down = weights["o"].copy(), weights["down"].copy()
    weights["down"][:] = 0.0
    for kind, share in ((local, LOCAL_SHARE), (~local, FAR_SHARE)):
        rows = np.repeat(kind, dim)
        weights["o"] = np.where(rows[:, None], o, 0.0).astype(np.float32)
        o[rows] *= share / _rms(_residual(params, config, layer + 1) - before)
    weights["o"] = o
    attended = _residual(params, config, layer + 1)
    weights["down"] = down
    weights["down"] *= FFN_SHARE / _rms(_residual(params, config, layer + 1) - attended)


def _bump_lanes(config: ModelConfig) -> np.ndarray:
    """Lanes of five rotated pairs with frequencies from 1 down, apart from which content is scored."""
    frequencies = rope_frequencies(config.rope, config.head_dim)
    pairs = sorted({int(np.argmin(np.abs(np.log(frequencies / f)))) for f in (1.0, 0.32, 0.1, 0.032, 0.01)})
    return np.array([*pairs, *(pair + config.head_dim // 2 for pair in pairs)])


def _clear_bump_lanes(qkv: np.ndarray, config: ModelConfig) -> None:
    """Content must not leak into the bump: it would be noise as high as the bump."""
    num_qk = config.num_heads + config.num_kv_heads
    by_head = qkv[:, : num_qk * config.head_dim].reshape(len(qkv), num_qk, config.head_dim)
    by_head[:, :, _bump_lanes(config)] = 0.0
    qkv[:, : num_qk * config.head_dim] = by_head.reshape(len(qkv), -1)


def _add_bump(qkv: np.ndarray, config: ModelConfig, local: np.ndarray, constant_square: float) -> None:
    """Let lane 0 put the same vector into all keys and the queries of local heads: a score of
    LOCAL_BUMP * mean(cos(frequency * distance))."""
    num_qk, lanes = config.num_heads + config.num_kv_heads, _bump_lanes(config)
    vector = np.zeros(config.head_dim, np.float32)
    vector[lanes] = (LOCAL_BUMP * config.head_dim**0.5 / (len(lanes) * constant_square)) ** 0.5
    has_bump = np.concatenate([local, np.ones(config.num_kv_heads, bool)])
    qkv[0, : num_qk * config.head_dim] = np.where(has_bump[:, None], vector, 0.0).reshape(-1)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x[len(x) // 2 :, 1:]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests/fixtures/models")
    parser.add_argument("--only", choices=FIXTURES)
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else FIXTURES:
        fixture = FIXTURES[name]
        params = calibrated_params(fixture.config, fixture.seed)
        save_checkpoint(arguments.out / name, fixture.config, params, num_files=fixture.num_files)
        train_tokenizer(fixture.config.vocab_size).save(str(arguments.out / name / "tokenizer.json"))
        print(f"{arguments.out / name}: {fixture.config.num_layers} layers")


if __name__ == "__main__":
    main()
