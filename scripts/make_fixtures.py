"""Make the fixture checkpoints of the tests: small models of every family in which no KV token can go wrong unseen.

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

Where queries and keys are normed, the norms' weights take the place of the gains: the lanes of the bump and the others
are scaled apart. Where what a layer adds is normed, its norm's weights say how much that is.

The gains also keep the model from chaos: scores stay of order 10, so the noise of another order of summation (1e-7 a
step) reaches the log-probabilities as a few 1e-5. `tests/loong_jax/model/test_fixture_power.py` measures both.
"""

import argparse
import pydoc_data.topics
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loong_jax.config import ModelConfig, RopeConfig
from loong_jax.model.decoder import Params, decode_stack, init_params
from loong_jax.model.export import save_checkpoint
from loong_jax.model.families import family_of
from loong_jax.model.layers import rms_norm
from loong_jax.model.oracle import model_attention
from loong_jax.model.rope import rope_frequencies

PROBE_TOKENS = 2048
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
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


SMALL = msgspec.structs.replace(LLAMA, vocab_size=256, intermediate_size=64, num_layers=2)
LONGROPE = RopeConfig(
    kind="longrope",
    factor=8.0,
    original_max_position=512,
    attention_factor=1.15,
    short_factor=tuple(1.0 + 0.02 * i for i in range(16)),
    long_factor=tuple(1.0 + 0.3 * i for i in range(16)),
)


class Fixture(msgspec.Struct, frozen=True):
    """`num_files`: of weights. A fixture of another family has its own tokenizer only if a test serves it."""

    config: ModelConfig
    seed: int
    num_files: int = 1
    tokenizer: bool = False


def _small(**changes: object) -> ModelConfig:
    return msgspec.structs.replace(SMALL, **changes)


FIXTURES = {
    "gqa": Fixture(msgspec.structs.replace(LLAMA, rope=RopeConfig(1000.0)), 0, tokenizer=True),
    "mha": Fixture(msgspec.structs.replace(LLAMA, num_layers=2, num_kv_heads=4, norm_eps=1e-6), 1, tokenizer=True),
    "tied": Fixture(
        msgspec.structs.replace(LLAMA, vocab_size=509, tie_embeddings=True, eos_ids=(1, 2)), 2, tokenizer=True
    ),
    "rope3": Fixture(
        msgspec.structs.replace(LLAMA, rope=ROPE3, head_dim=64, num_layers=2), 3, num_files=3, tokenizer=True
    ),
    "bf16": Fixture(msgspec.structs.replace(LLAMA, dtype="bfloat16", head_dim=64, num_layers=2), 4, tokenizer=True),
    "longrope": Fixture(_small(rope=LONGROPE, max_position=4096, qkv_bias=True, o_bias=True), 5),
    "mistral": Fixture(_small(family="mistral", windows=(50, 50), rope=RopeConfig(kind="linear", factor=2.0)), 6),
    "qwen2": Fixture(
        _small(
            family="qwen2",
            qkv_bias=True,
            windows=(0, 40),
            rope=RopeConfig(1e5, "yarn", 4.0, original_max_position=512, attention_factor=1.1386),
        ),
        7,
    ),
    "qwen3": Fixture(
        _small(
            family="qwen3",
            max_position=2048,
            rope=RopeConfig(1e4, "dynamic", 2.0, original_max_position=2048),
            tie_embeddings=True,
        ),
        8,
    ),
    "gemma2": Fixture(
        _small(
            family="gemma2",
            windows=(30, 0),
            query_scalar=24,
            attn_soft_cap=25.0,
            logit_soft_cap=10.0,
            tie_embeddings=True,
        ),
        9,
    ),
    "gemma3": Fixture(
        _small(
            family="gemma3_text",
            num_layers=3,
            num_kv_heads=1,
            windows=(30, 30, 0),
            rope=RopeConfig(1e5, "linear", 4.0),
            window_rope=RopeConfig(1e3),
            query_scalar=32,
            tie_embeddings=True,
        ),
        10,
    ),
}


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with SPECIAL_TOKENS as ids 0, 1, 2; encoding a text puts <s> before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.train_from_iterator([text for _, text in sorted(pydoc_data.topics.topics.items())], trainer)
    return tokenizer


def probe_tokens(vocab_size: int, num_tokens: int = PROBE_TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(3, vocab_size, num_tokens).astype(np.int32)


def calibrated_params(config: ModelConfig, seed: int) -> Params:
    """Float32 parameters with power. Heads of even index are local, of odd index far."""
    config = msgspec.structs.replace(config, dtype="float32")
    family = family_of(config)
    rng = np.random.default_rng(seed)
    params = _to_numpy(init_params(config, seed))
    params["embed"] *= config.hidden_size**0.5
    params["embed"][:, 0] = CONSTANT
    if family.scaled_embedding:
        params["embed"] /= config.hidden_size**0.5
    if not config.tie_embeddings:
        params["lm_head"][:, 0] = 0.0
    for layer in range(config.num_layers):
        _calibrate_layer(params, config, layer, rng)
    weights = _norm_weights(rng, config.hidden_size)
    weights[0] = 0.0  # a tied head would add the constant to all logits
    hidden = rms_norm(jnp.asarray(_probe(params, config, config.num_layers)[0]), jnp.asarray(weights), config.norm_eps)
    weights *= LOGITS / np.std(hidden @ params["embed" if config.tie_embeddings else "lm_head"].T)
    params["final_norm"] = weights - family.norm_offset
    return params


def _to_numpy(params: Params) -> Params:
    layers = [{name: np.array(leaf) for name, leaf in layer.items()} for layer in params["layers"]]
    return {name: layers if name == "layers" else np.array(leaf) for name, leaf in params.items()}


def _norm_weights(rng: np.random.Generator, size: int) -> np.ndarray:
    """What a norm scales by: far enough from one that a forgotten weight shows; one in the constant lane."""
    weights = rng.uniform(0.6, 1.4, size).astype(np.float32)
    weights[0] = 1.0
    return weights


class Probe(NamedTuple):
    """Of the last layer run on the probe prompt: what attention gives before `o`, queries and keys."""

    out: Any
    q: Any
    k: Any


def _probe(params: Params, config: ModelConfig, num_layers: int) -> tuple[np.ndarray, Probe | None]:
    """Hidden states of the probe after the first `num_layers` layers, and what its last layer did."""
    tokens = probe_tokens(config.vocab_size)
    cut = {**params, "layers": params["layers"][:num_layers]}
    attend = model_attention(config)

    def watched(_, layer, q, k, v):
        out, _ = attend(None, layer, q, k, v)
        return out, Probe(out, q, k)

    positions, length = jnp.arange(len(tokens)), jnp.full(len(tokens), len(tokens))
    hidden, seen = decode_stack(cut, config, jnp.asarray(tokens), positions, watched, None, rope_len=length)
    return np.asarray(hidden), None if seen is None else Probe(*map(np.asarray, seen))


def _calibrate_layer(params: Params, config: ModelConfig, layer: int, rng: np.random.Generator) -> None:
    weights, family = params["layers"][layer], family_of(config)
    dim, num_heads, d = config.head_dim, config.num_heads, config.hidden_size
    norms = {name: _norm_weights(rng, d) for name in ("attn_norm", "ffn_norm")}
    if family.post_norms:
        shares = {"attn_post_norm": FAR_SHARE, "ffn_post_norm": FFN_SHARE}
        norms |= {name: _norm_weights(rng, d) * share for name, share in shares.items()}
    weights |= {name: norm - np.float32(family.norm_offset) for name, norm in norms.items()}
    for name in ("qkv", "gate_up"):
        weights[name][0] = 0.0
    for name in ("o", "down"):
        weights[name][:, 0] = 0.0
    _clear_bump_lanes(weights["qkv"], config)
    if config.qkv_bias:
        _clear_bump_lanes(weights["qkv_bias"][None], config)
    if config.o_bias:
        weights["o_bias"][0] = 0.0
    before = _probe(params, config, layer)[0]
    normed = np.asarray(rms_norm(jnp.asarray(before), jnp.asarray(norms["attn_norm"]), config.norm_eps))
    local = np.arange(num_heads) % 2 == 0
    _calibrate_scores(params, config, layer, local, normed, rng)

    # Gains: what each kind of head, then the FFN, adds to the residual.
    attended = _probe(params, config, layer + 1)[1]
    assert attended is not None
    out = attended.out.reshape(len(before), -1)
    for kind, share in ((local, LOCAL_SHARE), (~local, FAR_SHARE)):
        rows = np.repeat(kind, dim)
        weights["o"][rows] *= share / _rms(out[:, rows] @ weights["o"][rows])
    down = weights["down"].copy()
    weights["down"][:] = 0.0
    without_ffn = _probe(params, config, layer + 1)[0]
    weights["down"] = down
    if not family.post_norms:  # else the norm says what is added
        weights["down"] *= FFN_SHARE / _rms(_probe(params, config, layer + 1)[0] - without_ffn)


def _calibrate_scores(
    params: Params, config: ModelConfig, layer: int, local: np.ndarray, normed: np.ndarray, rng: np.random.Generator
) -> None:
    """Scores by content of every head to the deviation of its kind, then the bump of local heads."""
    weights, dim, num_heads = params["layers"][layer], config.head_dim, config.num_heads
    fused = (normed @ weights["qkv"] + weights.get("qkv_bias", 0.0)).reshape(len(normed), -1, dim)
    q, k = fused[:, :num_heads], fused[:, num_heads : num_heads + config.num_kv_heads]
    for head in range(num_heads):
        scores = _scores(q[:, head], k[:, head * config.num_kv_heads // num_heads], config)
        gain = (LOCAL_SCORES if local[head] else FAR_SCORES) / scores.std()
        weights["qkv"][:, head * dim : (head + 1) * dim] *= gain
        if config.qkv_bias:
            weights["qkv_bias"][head * dim : (head + 1) * dim] *= gain
    _add_bump(weights["qkv"], config, local, float(np.mean(normed[:, 0] ** 2)))
    if not family_of(config).qk_norm:
        return
    content = np.ones(dim, bool)
    content[_bump_lanes(config)] = False
    seen = _probe(params, config, layer + 1)[1]
    assert seen is not None
    far, keys = seen.q[:, ~local][:, 0], seen.k[:, int(np.flatnonzero(~local)[0]) * config.num_kv_heads // num_heads]
    gain = np.where(content, (FAR_SCORES / _scores(far, keys, config).std()) ** 0.5, 0.0)
    near, keys = seen.q[:, local][:, 0][:, ~content], seen.k[:, 0][:, ~content]
    height = np.mean(np.sum(near * keys, axis=1)) * config.attention_scale
    gain = np.where(content, gain, (LOCAL_BUMP / height) ** 0.5).astype(np.float32)
    for name in ("q_norm", "k_norm"):
        # The pair of a lane is scaled with it, else rotation would not commute with the weights.
        spread = np.tile(rng.uniform(0.8, 1.25, dim // 2), 2).astype(np.float32)
        weights[name] = gain * (spread if name == "q_norm" else 1 / spread) - np.float32(family_of(config).norm_offset)


def _scores(q: np.ndarray, k: np.ndarray, config: ModelConfig) -> np.ndarray:
    return q[:: PROBE_TOKENS // 256] @ k.T * config.attention_scale


def _bump_lanes(config: ModelConfig) -> np.ndarray:
    """Lanes of five rotated pairs with frequencies from 1 down, apart from which content is scored."""
    length = jnp.array([PROBE_TOKENS])
    frequencies = np.asarray(rope_frequencies(config.rope, config.head_dim, length)).reshape(-1)
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
    vector[lanes] = (LOCAL_BUMP / config.attention_scale / (len(lanes) * constant_square)) ** 0.5
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
        if fixture.tokenizer:
            train_tokenizer(fixture.config.vocab_size).save(str(arguments.out / name / "tokenizer.json"))
        print(f"{arguments.out / name}: {fixture.config.num_layers} layers")


if __name__ == "__main__":
    main()
