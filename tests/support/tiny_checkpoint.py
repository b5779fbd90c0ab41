"""A checkpoint of a few kilobytes with random weights and the byte tokenizer, for servers started by tests."""

from pathlib import Path

from loong_jax.config import ModelConfig
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint
from tests.support.byte_tokenizer import BOS, EOS, VOCAB_SIZE, save_byte_tokenizer

CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=8192,
    tie_embeddings=True,
    bos_id=BOS,
    eos_ids=(EOS,),
)


def make_tiny_checkpoint(directory: Path):
    """Write it; returns its parameters (tp = 1)."""
    params = init_params(CONFIG, 0)
    save_checkpoint(directory, CONFIG, params)
    save_byte_tokenizer(directory)
    return params
