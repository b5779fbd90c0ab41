"""The fixture checkpoints of tests/fixtures: their directories, and their parameters on one device."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from loong_jax.config import ModelConfig
from loong_jax.model.checkpoint import load_checkpoint
from loong_jax.model.decoder import Params
from loong_jax.model.hf_config import read_config
from loong_jax.model.oracle import Oracle

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("gqa", "mha", "tied", "rope3", "bf16")
FLOAT32_NAMES = NAMES[:4]
FAMILY_NAMES = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "longrope")
"""One of each family beside Llama and of each kind of rotary embedding, all float32."""


class Fixture(NamedTuple):
    config: ModelConfig
    params: Params  # of one rank at tp = 1, without the tp axis, layers as a list

    @property
    def oracle(self) -> Oracle:
        return Oracle(self.config, self.params)


def model_directory(name: str) -> Path:
    return FIXTURES / "models" / name


@cache
def load_fixture(name: str) -> Fixture:
    return load_directory(model_directory(name))


def load_directory(directory: Path) -> Fixture:
    config = read_config(directory)
    loaded = load_checkpoint(directory, config, tp=1, devices=[jax.devices()[:1]], stacked=False)
    return Fixture(config, jax.tree.map(lambda leaf: leaf[0], loaded[0][0]))


def random_prompt(config: ModelConfig, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Ids without the special ones."""
    return np.random.default_rng(seed).integers(3, config.vocab_size, num_tokens).astype(np.int32)
