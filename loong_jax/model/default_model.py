"""The small default model the project makes itself, for the demo and a first try without a download.

What it is: a Llama checkpoint directory, as `transformers` would load it, with random weights and a byte-level BPE
tokenizer trained on the interpreter's own help texts. The same everywhere the same Python is.
What it is not: a model that says anything.
"""

import pydoc_data.topics
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loong_jax.config import ModelConfig, RopeConfig
from loong_jax.model.decoder import init_params
from loong_jax.model.export import save_checkpoint

DEFAULT_CONFIG = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=131_072,
    rope=RopeConfig(theta=500_000.0),
    tie_embeddings=True,
    bos_id=0,
    eos_ids=(1,),
)
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


def make_default_model(directory: str | Path, *, seed: int = 0) -> Path:
    """Write the default model to `directory` unless it is there; returns the directory.

    Made beside and renamed into place, so that two processes may ask at once and a broken start leaves nothing behind.
    """
    directory = Path(directory)
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "model"
        save_checkpoint(made, DEFAULT_CONFIG, init_params(DEFAULT_CONFIG, seed))
        train_tokenizer(DEFAULT_CONFIG.vocab_size).save(str(made / "tokenizer.json"))
        try:
            made.rename(directory)
        except OSError:
            if not (directory / "config.json").exists():  # else another process was first
                raise
    return directory


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
