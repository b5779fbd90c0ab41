"""Training: schedules, the optimiser's directions, the bias, and a run that was killed goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needle import training
from needle.model import Shape
from needle.sequences import ASKED, DECOY, PROSE, Content, Sample
from needle.tokens import Corpus, Tokens
from needle.training import Schedule, Stage
from tokenizers import Tokenizer

from loong_jax.default_model import DEFAULT_MODEL

SHAPE = Shape(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=32)
SCHEDULE = Schedule(
    steps=6,
    tokens_per_step=256,
    save_every=3,
    stages=(Stage(1.0, Content(128, 0.5, (1, 2), 0.5, 0.5)),),
    warm_up_steps=1,
)


def test_schedule():
    schedule = Schedule(steps=1000, minutes=10.0)
    assert schedule.fraction(250, 0.0) == 0.25
    assert schedule.fraction(250, 480.0) == 0.8
    assert [schedule.content(f).length for f in (0.0, 0.3, 0.5, 1.0)] == [128, 256, 256, 512]
    assert schedule.multiplicity(0.1) == 1.0
    assert schedule.multiplicity(0.9) == pytest.approx(schedule.max_multiplicity)
    assert schedule.rate(0, 0.0) < schedule.rate(100, 0.1) == schedule.learning_rate
    assert schedule.rate(900, 0.9) < schedule.learning_rate


def test_muon_makes_matrices_nearly_orthogonal_layer_by_layer():
    grads = jax.random.normal(jax.random.key(0), (2, 24, 40)) * jnp.array([1.0, 1e-3])[:, None, None]
    muon = training.muon()
    updates, _ = muon.update(grads, muon.init(grads))
    sizes = np.linalg.svd(np.asarray(updates), compute_uv=False) / (0.2 * 40**0.5)
    assert sizes.min() > 0.5
    assert sizes.max() < 1.5


def test_bias_counts_far_prose_many_times_and_decoys_fewer():
    positions = np.array([[0, 1, 100, 101, 102]], np.int32)
    kinds = np.array([[PROSE, DECOY, PROSE, ASKED, PROSE]], np.int32)
    chunks = np.array([[0, 0, 1, 1, 1]], np.int32)
    bias = training.attention_bias(Sample(None, None, kinds, chunks, positions), jnp.array([64.0]), 16.0)[0]
    np.testing.assert_allclose(np.exp(bias[4]), [64.0, 16.0, 1.0, 1.0, 1.0], rtol=1e-5)
    assert not bias[1].any()


def test_a_killed_run_goes_on_to_the_same_model(tmp_path, monkeypatch):
    corpus = Corpus(np.arange(2000, dtype=np.int32) % 1000, np.arange(0, 1000, 50))
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    monkeypatch.setattr(training, "prepare", lambda folder, seed: prepared(folder))

    def prepared(folder):
        tokenizer.save(str(folder / "tokenizer.json"))
        return Tokens(tokenizer), (corpus, corpus)

    told: list[str] = []
    whole = training.train(tmp_path / "whole", SHAPE, SCHEDULE, told.append)
    assert whole.step == 6
    assert [line.split()[1] for line in told] == ["3", "6"]

    def die(line: str) -> None:
        told.append(line)
        if line.startswith("step 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "killed", SHAPE, SCHEDULE, die)
    assert training.restore(tmp_path / "killed", SHAPE, SCHEDULE).step == 3  # killed before the second was kept
    told.clear()
    again = training.train(tmp_path / "killed", SHAPE, SCHEDULE, told.append)
    assert told[0] == "going on from step 3"
    for name, value in whole.params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(again.params[name]), err_msg=name)
