"""What the TPU kernel computes of a prompt, beside what the model needs: whole blocks against visible pairs.

Products outside of kernels are counted from the compiled step (`test_compiled.py`); here are those inside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loong_jax.aot.models import model_named
from loong_jax.aot.plan import Sizes, prefill_bucket
from loong_jax.cost.roofline import shape_of
from pallas_kernels.chips import chip_of
from pallas_kernels.flash_partial.tpu import SOME, choose_blocks, step_list
from pallas_kernels.flash_partial.visibility import extents

PROMPT, CHUNK, PAGE = 131072, 8192, 16


def computed_pairs(dop: int, tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """(query, key) pairs of the blocks that a chunk of `dop * tokens` tokens computes on itself, over all ranks: units
    of a page, striped over the ranks."""
    blocks = choose_blocks(chip_of("TPU v5e"), tokens, tokens, heads // kv_heads, dim, 2, None, None)
    units = np.arange(dop * tokens // PAGE).reshape(-1, dop).T  # of each rank
    position = (units[:, :, None] * PAGE + np.arange(PAGE)).reshape(dop, tokens)

    @jax.jit
    def steps(q_position, kv_position):
        of = lambda position, size: extents(*(a.reshape(-1, size) for a in (0 * position, position)))
        words, count = step_list(of(q_position, blocks.q), of(kv_position, blocks.kv), None, 0, tokens // blocks.q)
        return jnp.sum(((words & SOME) != 0) & (jnp.arange(words.size) < count))

    num_steps = sum(int(steps(q_position, kv_position)) for q_position in position for kv_position in position)
    return num_steps * blocks.q * blocks.kv


@pytest.mark.parametrize("dop", [1, 4])
def test_a_long_prompt_costs_what_the_model_needs(dop: int):
    """At most 1.03 times the model's operations, over all chunks of a prompt of 128K tokens of an 8B model. Chunks meet
    their context without waste: every key of it is visible to every query."""
    model = model_named("llama-3-8b")
    tokens = prefill_bucket(Sizes(dop=dop, tp=1, context=PROMPT))
    assert dop * tokens == CHUNK
    own = computed_pairs(dop, tokens, model.num_heads, model.num_kv_heads, model.head_dim)
    needed = CHUNK * (CHUNK + 1) // 2
    assert own >= needed
    num_chunks = PROMPT // CHUNK
    context = CHUNK * CHUNK * num_chunks * (num_chunks - 1) // 2
    linear = 2 * shape_of(model).linear_params * PROMPT
    per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
    computed = linear + per_pair * (context + num_chunks * own)
    ideal = linear + per_pair * (context + num_chunks * needed)
    assert 1 <= computed / ideal <= 1.03
