"""No KV token of a fixture can go wrong unseen, and no order of summation is seen (DESIGN 8).

Every token of a prompt, at every layer, is hidden, counted twice, rotated by a position too many, or replaced by its
neighbour, as the query itself or one just after sees it: each time some log-probability moves by over 1e-2. Summing
in another order moves none by more than 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.model.decoder import decode_stack, init_params, logits
from tests.support.fixtures import FAMILY_NAMES, NAMES, load_fixture, random_prompt
from tests.support.kv_mutation import Mutation, mutated_change, right_run

POWER, NOISE = 1e-2, 1e-4


def least_change(fixture, num_tokens, mutation, layer, distances=(0, 1)):
    """Over all positions, the smallest of what some query within `distances` notices."""
    tokens = jnp.asarray(random_prompt(fixture.config, num_tokens))
    right = right_run(fixture.params, fixture.config, tokens)
    noticed = np.zeros(num_tokens)
    for distance in distances:
        change = mutated_change(fixture.params, fixture.config, tokens, right, layer, mutation, distance)
        noticed[: len(change)] = np.maximum(noticed[: len(change)], change)
    return noticed.min()


@pytest.mark.parametrize("mutation", Mutation, ids=lambda m: m.name)
@pytest.mark.parametrize("name", NAMES + FAMILY_NAMES)
def test_every_token_at_every_layer_matters(name, mutation):
    fixture = load_fixture(name)
    for layer in range(fixture.config.num_layers):
        assert least_change(fixture, 256, mutation, layer) > POWER, layer


@pytest.mark.parametrize("mutation", [Mutation.HIDE, Mutation.SHIFT], ids=lambda m: m.name)
def test_every_token_of_a_long_prompt_matters(mutation):
    fixture = load_fixture("gqa")
    assert least_change(fixture, 2048, mutation, fixture.config.num_layers - 1) > POWER


@pytest.mark.slow
@pytest.mark.parametrize("mutation", Mutation, ids=lambda m: m.name)
@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_6000_matters(name, mutation):
    fixture = load_fixture(name)
    for layer in range(fixture.config.num_layers):
        assert least_change(fixture, 6144, mutation, layer) > POWER, layer


def test_a_token_lost_far_back_is_noticed_within_some_decode_steps():
    """Not only neighbours notice: 16 decode steps far behind notice almost any single lost token."""
    fixture = load_fixture("gqa")
    tokens = jnp.asarray(random_prompt(fixture.config, 1024))
    right = right_run(fixture.params, fixture.config, tokens)
    for layer in range(fixture.config.num_layers):
        steps = [
            mutated_change(fixture.params, fixture.config, tokens, right, layer, Mutation.HIDE, distance)[:400]
            for distance in range(600, 616)
        ]
        assert np.mean(np.max(steps, axis=0) > 1e-3) > 0.95, layer


def test_ordinary_random_weights_would_not_notice():
    """The ruler can read low: it is the fixtures that have power."""
    config = load_fixture("gqa").config
    plain = load_fixture("gqa")._replace(params=init_params(config, 0))
    assert least_change(plain, 1024, Mutation.HIDE, config.num_layers - 1) < POWER / 3


@pytest.mark.parametrize("name", NAMES[:4])
def test_order_of_summation_does_not_matter(name):
    fixture = load_fixture(name)
    tokens = jnp.asarray(random_prompt(fixture.config, 2048))
    right, _ = right_run(fixture.params, fixture.config, tokens)
    other = np.asarray(_other_order(fixture.params, fixture.config, tokens))
    assert np.abs(other - np.asarray(right)).max() < NOISE


def _other_order(params, config, tokens, block=64):
    """Log-probabilities with attention summed block by block, the latest keys first."""

    def attend(carry, layer, q, k, v):
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2]) * q.shape[2] ** -0.5

        def add_block(i, state):
            peak, total, out = state
            first = len(k) - (i + 1) * block
            keys, values = (jax.lax.dynamic_slice_in_dim(x, first, block) for x in (k, v))
            scores = jnp.einsum("tkgd,skd->tkgs", grouped, keys)
            visible = first + jnp.arange(block) <= jnp.arange(len(q))[:, None]
            scores = jnp.where(visible[:, None, None], scores, -1e30)
            higher = jnp.maximum(peak, scores.max(-1))
            weights = jnp.where(visible[:, None, None], jnp.exp(scores - higher[..., None]), 0.0)
            fade = jnp.exp(peak - higher)
            out = out * fade[..., None] + jnp.einsum("tkgs,skd->tkgd", weights, values)
            return higher, total * fade + weights.sum(-1), out

        start = (jnp.full(grouped.shape[:3], -1e30), jnp.zeros(grouped.shape[:3]), jnp.zeros(grouped.shape))
        _, total, out = jax.lax.fori_loop(0, len(k) // block, add_block, start)
        return (out / total[..., None]).reshape(q.shape), carry

    @jax.jit
    def run(params):
        hidden, _ = decode_stack(params, config, tokens, jnp.arange(len(tokens)), attend, None)
        return jax.nn.log_softmax(logits(params, config, hidden))

    return run(params)
