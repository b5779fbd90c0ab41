"""Small tokenizers of the two kinds that models have: byte-level BPE (GPT-2, Llama 3, Qwen), and pieces of text with
byte fallback (Llama 2, Mistral, Gemma)."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "hello world, hello tokens",
    "naïve café — déjà vu",
    "你好世界 弹性序列并行",
    "🐉🐲 👩\u200d👩\u200d👧 👍🏽",
    "e\u0301 a\u0308 ก็ นี่ क्षि",
]


def byte_level_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<tool>"])  # added, and not special: it has text
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's: "▁" for spaces, <0xNN> for bytes of characters it does not know."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [chr(char) for char in range(33, 127)] + ["▁", "你", "好", "é", "\u0301", "he", "▁he", "ll", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("▁", "he"), ("l", "l"), ("▁", "▁")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
