"""The sampling law in plain numpy, from its definition: what the steps must reproduce.

Noise is JAX's, for it is keyed data and no law. What it is not: fast, batched, or a user of any code it judges.
"""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from loong_jax.types import Adjustment, Sampling
from tests.support.mock_matcher import allowed


def adjusted(
    logits: np.ndarray,
    adjustment: Adjustment,
    prompt: Sequence[int],
    generated: Sequence[int],
    stop_ids: Sequence[int] = (),
) -> np.ndarray:
    """`logits` `[vocab]` for the token after `prompt + generated`; what is banned is -inf."""
    out = np.array(logits, np.float64)
    for token, bias in adjustment.logit_bias:
        out[token] += bias
    if len(generated) < adjustment.min_tokens:
        out[list(stop_ids)] = -np.inf
    for token in {*prompt, *generated}:
        penalty = adjustment.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token, count in Counter(generated).items():
        out[token] -= adjustment.frequency_penalty * count + adjustment.presence_penalty
    if adjustment.grammar:
        out[~allowed(adjustment.grammar, generated, len(out))] = -np.inf
    return out


def kept(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Which tokens min-p, then top-k, then top-p leave, `[vocab]` bool. Ties with the last one kept are kept."""
    scaled = np.array(logits, np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < sampling.min_p] = 0
    order = np.argsort(-weights, kind="stable")[: sampling.top_k or len(weights)]
    mass = np.cumsum(weights[order]) / weights[order].sum()
    before = mass - weights[order] / weights[order].sum()
    last = order[(before < sampling.top_p) | (np.arange(len(order)) == 0)][-1]
    return (weights >= weights[last]) & (weights > 0) if sampling.top_k or sampling.top_p < 1 else weights > 0


def scores(logits: np.ndarray, sampling: Sampling, position: int) -> np.ndarray:
    """The token to sample at `position` is the largest of these, `[vocab]`."""
    if sampling.temperature == 0:
        return np.array(logits, np.float64)
    key = jax.random.fold_in(jax.random.key(np.uint32(sampling.seed)), position)
    noise = np.asarray(jax.random.gumbel(key, (len(logits),)), np.float64)
    return np.where(kept(logits, sampling), np.asarray(logits, np.float64) / sampling.temperature + noise, -np.inf)


def logprobs(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - np.log(np.exp(shifted).sum())
