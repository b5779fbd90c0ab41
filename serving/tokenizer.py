"""Text to token ids and back, and the search for stop strings in what comes back.

The work is the `tokenizers` library's; special tokens (BOS) are added as the checkpoint's tokenizer.json says, or as
its chat template does. What it is not: the rendering of that template (`serving/chat.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import tokenizers

from loong_jax.model.untrusted import is_there, read_bytes
from serving.chat import ChatTemplate

TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
_CONTEXT_TOKENS = 6
"""Prompt tokens that precede the text: some decoders strip the space of a first word."""
_MAX_CHARACTER_TOKENS = 4
_MAX_WINDOW_TOKENS = 32
_LONG_CONTEXT_TOKENS = 16
_FEW_TOKENS = 4
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_PLAIN_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
_MAX_BATCH_TOKENS = 256
_REPLACEMENT = "\ufffd"


class TokenizerError(ValueError):
    """A tokenizer.json that cannot be used. The message names the file."""


class Tokenizer:
    """A checkpoint's tokenizer. Encoding may take a second for a million tokens: call it off the event loop."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._is_plain = _decodes_plainly(tokenizer)
        self._pieces: dict[int, str | None] = {}  # at most one for each token of the vocabulary

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a checkpoint and its chat template, None when it has none. Raises TokenizerError,
        CheckpointError."""
        if not is_there(directory, TOKENIZER_FILE):
            return None
        content = read_bytes(directory, TOKENIZER_FILE, _MAX_TOKENIZER_BYTES)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{directory / TOKENIZER_FILE}: {str(error)[:500]}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, ChatTemplate.load(directory))

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def render_chat(self, messages: Sequence[tuple[str, str]], now_s: float) -> str:
        """What the chat template makes of (role, content) messages. Raises InvalidField."""
        assert self._chat is not None, "asked for without a chat template"
        return self._chat.render(messages, now_s)

    def encode_chat(self, text: str) -> list[int]:
        """Encode what `render_chat` gave: it holds its special tokens, none are added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def close(self) -> None:
        if self._chat is not None:
            self._chat.close()

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A stream of text for the tokens that follow the prompt."""
        return Detokenizer(self, prompt_ids)

    def shown(self, token_id: int) -> str:
        """A token by itself, for people and for clients' tables: its text with the space before a word, which decoders
        take off a first one; the name of a special token; "" for what only the model's vocabulary has."""
        name = self._tokenizer.id_to_token(token_id)
        if name is None or token_id in self._special:
            return name or ""
        once, twice = self.decode([token_id]), self.decode([token_id, token_id])
        return twice[len(once) :] if twice.startswith(once) else once

    def piece(self, token_id: int) -> str | None:
        """The text that a token adds where no character is open and something comes before it; None: that depends."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._piece(token_id)
            return piece

    def _piece(self, token_id: int) -> str | None:
        name = self._tokenizer.id_to_token(token_id)
        if not self._is_plain or not name or token_id in self._special or _BYTE_TOKEN.fullmatch(name):
            return None
        once, twice = self.decode([token_id]), self.decode([token_id, token_id])
        if not once or _REPLACEMENT in twice or not twice.startswith(once):
            return None
        return twice[len(once) :]

    def has_text(self, token_id: int) -> bool:
        """Whether decoding heeds this token: not a special one, nor one that only the model's vocabulary has."""
        return token_id not in self._special and self._tokenizer.id_to_token(token_id) is not None


class Detokenizer:
    """Incremental decoding of one request's tokens: a piece never ends within a character.

    The pieces add up to the decoding of all tokens at once, with one exception: where a run of byte tokens (byte
    fallback) holds what is no UTF-8 (or U+FFFD itself), the library replaces the whole run, and here its complete
    characters have been sent. A step decodes a window of a few tokens, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # context, then tokens whose text is not all sent
        self._num_context = 0
        self._sent = ""  # the beginning of the window's text, which is context or has been sent
        self._is_stale = False  # `_sent` is to be found anew: all of the window has been sent
        context = [token for token in prompt_ids[-_CONTEXT_TOKENS:] if tokenizer.has_text(token)]
        while context and (text := tokenizer.decode(context)).startswith(_REPLACEMENT):
            context.pop(0)  # cut within a character
        if context:
            self._window, self._num_context = context, len(context)
            self._sent = text[: len(text) - _num_open(text)]

    def step(self, token_id: int) -> str:
        """The text that this token completes, "" when a character is still open."""
        window = self._window
        piece = self._tokenizer.piece(token_id)
        if piece is not None and self._num_context == len(window) > 0:
            window.append(token_id)
            self._num_context += 1
            self._is_stale = True
            if self._num_context >= _LONG_CONTEXT_TOKENS:
                self._window = window[-_CONTEXT_TOKENS:]
                self._num_context = _CONTEXT_TOKENS
            return piece
        if not self._tokenizer.has_text(token_id):
            return ""
        window.append(token_id)
        return self._advance()

    def steps(self, token_ids: Sequence[int]) -> str:
        """The same of several tokens, decoded at once."""
        if len(token_ids) <= _FEW_TOKENS:
            return "".join([self.step(token_id) for token_id in token_ids])
        pieces = []
        for first in range(0, len(token_ids), _MAX_BATCH_TOKENS):
            batch = token_ids[first : first + _MAX_BATCH_TOKENS]
            known = [token_id for token_id in batch if self._tokenizer.has_text(token_id)]
            if known:
                self._window += known
                pieces.append(self._advance())
        return "".join(pieces)

    def _advance(self) -> str:
        """The text of the window that has not been sent and is complete."""
        if self._is_stale:
            self._find_sent()
        text = self._tokenizer.decode(self._window)
        if not text.startswith(self._sent):
            # What follows changed how the context decodes, as malformed bytes in one run with it do.
            self._window, self._num_context, self._sent = self._window[self._num_context :], 0, ""
            text = self._tokenizer.decode(self._window)
        num_open = _num_open(text)
        piece = text[len(self._sent) : len(text) - num_open]
        self._sent += piece
        if num_open == 0 and piece:
            self._num_context = len(self._window)
            if self._num_context >= _LONG_CONTEXT_TOKENS:
                self._shorten_context()
        elif len(self._window) > _MAX_WINDOW_TOKENS:
            piece += self._shorten(text)
        return piece

    def _shorten_context(self) -> None:
        """All of the window has been sent: its last tokens are context enough."""
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._num_context = len(self._window)
        self._is_stale = True  # finding it is one more decoding, and may not be needed

    def _find_sent(self) -> None:
        context = self._window[: self._num_context]
        text = self._tokenizer.decode(context)
        while context and text.startswith(_REPLACEMENT):  # cut within a character
            del context[0], self._window[0]
            text = self._tokenizer.decode(context)
        self._num_context = len(context)
        self._sent, self._is_stale = text, False

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that was never completed; the stream starts afresh."""
        if self._is_stale:
            self._find_sent()
        rest = self._tokenizer.decode(self._window)[len(self._sent) :]
        self._window, self._num_context, self._sent = [], 0, ""
        return rest

    def _shorten(self, text: str) -> str:
        """Malformed text never ends a window. Cut it between two characters; what of the part before has not been sent
        is returned."""
        for cut in range(len(self._window) - 1, len(self._window) - _MAX_CHARACTER_TOKENS, -1):
            before, after = self._tokenizer.decode(self._window[:cut]), self._tokenizer.decode(self._window[cut:])
            if before + after == text:
                break
        else:
            cut, before, after = len(self._window), text, ""
        piece = before[len(self._sent) :]
        self._window, self._num_context = self._window[cut:], 0
        self._sent = after[: max(0, len(self._sent) - len(before))]
        return piece


def _decodes_plainly(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether complete text is the texts of its tokens, one after the other, but for what is stripped at its start."""
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    for part in decoder.get("decoders", [decoder]):
        pattern = part.get("pattern", {}).get("String", "")
        if part["type"] not in _PLAIN_DECODERS or (part["type"] == "Replace" and len(pattern) != 1):
            return False
        if part["type"] == "Strip" and part["stop"]:
            return False
    return True


def _num_open(text: str) -> int:
    """How many U+FFFD at the end may yet become a character, which has four bytes at most."""
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_CHARACTER_TOKENS - 1)


class Piece(msgspec.Struct, frozen=True):
    """Text to send now; `matched`: the stop string that ends the stream."""

    text: str
    matched: str | None = None


class StopFinder:
    """Finds the first of some stop strings in a growing text, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def step(self, piece: str) -> Piece:
        """Take the next piece. After a match, nothing more may be given."""
        if not self._stop or not piece:
            return Piece(piece)
        # What is held back is a proper prefix of a stop string, so every match starts within held + piece.
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            first, stop = min(found)
            return Piece(text[:first], stop)
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return Piece(text[: len(text) - num_held])

    def flush(self) -> str:
        """The text held back, when no more can come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
