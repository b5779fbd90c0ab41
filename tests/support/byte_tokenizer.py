"""A tokenizer of bytes made with the `tokenizers` library: id = byte, 256 = <s> (prepended to text), 257 = </s>."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from serving.chat import ChatLimits, ChatTemplate
from serving.tokenizer import Tokenizer

BOS, EOS, VOCAB_SIZE = 256, 257, 258


def _byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def byte_level(*, bos: bool = True) -> tokenizers.Tokenizer:
    vocab = {char: byte for byte, char in _byte_to_char().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def byte_tokenizer(*, bos: bool = True, chat_template: str | None = None) -> Tokenizer:
    chat = None
    if chat_template is not None:
        chat = ChatTemplate(chat_template, "chat_template", {"bos_token": "<s>", "eos_token": "</s>"}, ChatLimits())
    return Tokenizer(byte_level(bos=bos), chat)


def save_byte_tokenizer(directory: Path) -> None:
    byte_level().save(str(directory / "tokenizer.json"))
