"""The default model: made once, readable as any checkpoint, with a tokenizer that round-trips."""

from tokenizers import Tokenizer

from loong_jax.model.default_model import DEFAULT_CONFIG, make_default_model
from loong_jax.model.hf_config import read_config
from loong_jax.model.safetensors_reader import SafetensorsReader


def test_default_model(tmp_path):
    directory = make_default_model(tmp_path / "cache" / "model")
    assert read_config(directory) == DEFAULT_CONFIG
    with SafetensorsReader(directory) as tensors:
        tensors.check("model.embed_tokens.weight", (1024, 256), "float32")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == DEFAULT_CONFIG.vocab_size
    text = "Elastic — 弹性 \n\t sequence"
    ids = tokenizer.encode(text).ids
    assert ids[0] == DEFAULT_CONFIG.bos_id
    assert tokenizer.decode(ids) == text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]  # nothing left behind

    written_ns = (directory / "config.json").stat().st_mtime_ns
    assert make_default_model(directory) == directory
    assert (directory / "config.json").stat().st_mtime_ns == written_ns
