"""Detokenizing piece by piece, and stop strings in what comes back."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from loong_jax.model.untrusted import CheckpointError
from serving.tokenizer import Piece, StopFinder, Tokenizer, TokenizerError
from tests.support.byte_tokenizer import BOS, EOS, byte_level, byte_tokenizer, save_byte_tokenizer
from tests.support.text_tokenizers import byte_fallback, byte_level_bpe

BYTES = byte_tokenizer()


@given(st.text(max_size=40), st.text(max_size=10))
def test_pieces_add_up_to_the_text(text, prompt):
    detokenizer = BYTES.detokenizer(BYTES.encode(prompt))
    pieces = [detokenizer.step(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all(piece.encode() for piece in pieces if piece), "a piece is valid text of its own"


@given(st.binary(max_size=30))
def test_any_bytes_give_what_a_whole_decode_gives(data):
    detokenizer = BYTES.detokenizer([BOS])
    text = "".join(detokenizer.step(byte) for byte in data) + detokenizer.flush()
    assert text == data.decode(errors="replace")


KINDS = {"byte level": Tokenizer(byte_level_bpe()), "byte fallback": Tokenizer(byte_fallback())}
SCRIPTS = "aé 你好界弹👩‍👧👍🏽e\u0301\u0308กี\ufffd\n"
any_text = st.text(max_size=20) | st.text(st.sampled_from(SCRIPTS), max_size=30)


def streamed(tokenizer, ids, prompt=()):
    detokenizer = tokenizer.detokenizer(prompt)
    pieces = [detokenizer.step(token) for token in ids]
    for piece in pieces:
        piece.encode()
    return pieces, detokenizer.flush()


def whole(tokenizer, ids, prompt=()):
    """What the tokens add to the prompt's text."""
    before = tokenizer.decode(prompt)
    return tokenizer.decode([*prompt, *ids])[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text, prompt=any_text)
def test_pieces_of_any_script_add_up(kind, text, prompt):
    tokenizer = KINDS[kind]
    if kind == "byte fallback":
        text, prompt = text.replace("\ufffd", ""), prompt.replace("\ufffd", "")  # in bytes, as good as malformed
    ids = tokenizer.encode(text)
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert rest == ""
        assert "\ufffd" not in "".join(pieces), "no character was split"
    prompt_ids = tokenizer.encode(prompt)
    pieces, rest = streamed(tokenizer, ids, prompt_ids)
    if prompt_ids and not prompt.endswith("\ufffd"):
        assert "".join(pieces) + rest == whole(tokenizer, ids, prompt_ids)


@given(st.lists(st.integers(0, 340), max_size=60))
@settings(max_examples=300)
def test_any_tokens_of_a_byte_level_tokenizer_add_up(ids):
    """Malformed bytes, special tokens, and tokens that only the model has among them."""
    tokenizer = KINDS["byte level"]
    pieces, rest = streamed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 370) | st.integers(3, 258), max_size=80))
@settings(max_examples=300)
def test_any_tokens_of_a_byte_fallback_tokenizer_lose_nothing_else(ids):
    """A run with malformed bytes is one the library replaces whole, complete characters too; the rest is equal."""
    tokenizer = KINDS["byte fallback"]
    pieces, rest = streamed(tokenizer, ids)
    text, expected = "".join(pieces) + rest, tokenizer.decode(ids)
    if "\ufffd" not in expected:
        assert text == expected
    markers = [chr(token - 259 + 33) for token in ids if 259 <= token < 259 + 94]
    assert all(marker in text for marker in markers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "repeated",
    [[0x80], [0xF0], [0xF0, 0x9F], [0xE5, 0xBC, 0xB9], [0xE5, 0xBC, 0xB9, 0x80], "specials", "unknown", "text"],
)
def test_a_step_costs_the_same_however_long_the_text_is(kind, repeated, monkeypatch):
    tokenizer = KINDS[kind]
    if repeated == "text":
        ids = tokenizer.encode("hello 你好 " * 100)[:1000]
    elif repeated == "specials":
        ids = [0 if kind == "byte level" else 1] * 1000
    elif repeated == "unknown":
        ids = [5000] * 1000
    else:
        to_id = lambda byte: tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>")
        if kind == "byte level":
            to_id = lambda byte: tokenizer._tokenizer.token_to_id(BYTES._tokenizer.id_to_token(byte))
        ids = [to_id(byte) for byte in repeated] * (1000 // len(repeated))
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: (decoded.append(len(ids)), decode(ids))[1])
    detokenizer = tokenizer.detokenizer(ids)
    pieces = [detokenizer.step(token) for token in ids]
    assert max(decoded, default=0) <= 33
    assert sum(decoded) < 45 * len(ids)
    assert len("".join(pieces[-100:])) > 0 or repeated in ("specials", "unknown"), "text goes on coming"


def test_an_open_character_is_held_and_replaced_at_the_end():
    detokenizer = BYTES.detokenizer([BOS])
    euro = "€".encode()
    assert [detokenizer.step(byte) for byte in euro] == ["", "", "€"]
    assert [detokenizer.step(byte) for byte in euro[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens_have_no_text():
    detokenizer = BYTES.detokenizer([BOS])
    assert "".join(detokenizer.step(token) for token in [65, BOS, 66, EOS]) == "AB"


def test_a_prompt_that_ends_within_a_character():
    euro = list("€".encode())
    detokenizer = BYTES.detokenizer([BOS, 65, euro[0]])
    text = "".join(detokenizer.step(byte) for byte in [*euro[1:], 66, 67, 68]) + detokenizer.flush()
    assert text.endswith("BCD")


def test_the_space_of_a_first_word_is_kept():
    """Decoders of the sentencepiece kind strip it when they see the word alone."""
    vocab = {"▁hello": 0, "▁world": 1, "<unk>": 2}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Tokenizer(tokenizer).detokenizer([0])
    assert detokenizer.step(1) == " world"


def test_the_template_says_where_special_tokens_stand():
    tokenizer = byte_tokenizer(chat_template="{{ bos_token }}{{ messages[0].content }}")
    try:
        text = tokenizer.render_chat([("user", "ab")], 0.0)
        assert tokenizer.encode_chat(text) == [BOS, 97, 98]
        assert tokenizer.encode(text) == [BOS, BOS, 97, 98], "as a text prompt it would have two"
    finally:
        tokenizer.close()


def test_load(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    save_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("ab") == [BOS, 97, 98]
    assert tokenizer.vocab_size == 258
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    save_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "hi"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.has_chat_template


def change(**fields):
    """The byte tokenizer's file with other values."""
    return json.dumps(json.loads(byte_level().to_str()) | fields)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"a": ' * 100_000,
        change(model=None),
        change(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        change(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "zz"]]}),
        change(model={"type": "BPE", "vocab": {"a": 2**40}, "merges": []}),
        change(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 99}),
        change(decoder={"type": "Nothing"}),
        change(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
    ],
    ids=range(12),
)
def test_broken_tokenizers_are_refused_by_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: ") as refusal:
        Tokenizer.load(tmp_path)
    assert len(str(refusal.value)) < 1000


def test_a_tokenizer_out_of_the_folder_or_too_large(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link out of the folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: 1073741824 bytes are more than the limit"):
        Tokenizer.load(tmp_path)


def feed(stop: list[str], pieces: list[str]) -> tuple[list[str], str | None, int]:
    finder, sent = StopFinder(stop), []
    for index, piece in enumerate(pieces):
        out = finder.step(piece)
        sent.append(out.text)
        if out.matched is not None:
            return sent, out.matched, index
    return [*sent, finder.flush()], None, len(pieces)


@pytest.mark.parametrize(
    ("stop", "pieces", "sent", "matched"),
    [
        (["ab"], ["x", "a", "c"], ["x", "", "ac", ""], None),
        (["ab"], ["xa", "b", "never"], ["x", ""], "ab"),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (["b", "abc"], ["xab"], ["xa"], "b"),
        (["abc", "b"], ["x", "abcd"], ["x", ""], "abc"),
        (["abcd", "bc"], ["ab", "c"], ["", "a"], "bc"),
        (["long stop"], ["lon", "g st", "op"], ["", "", ""], "long stop"),
        (["long stop"], ["lon", "g st"], ["", "", "long st"], None),
        ([], ["a", "b"], ["a", "b", ""], None),
    ],
)
def test_stop_finder(stop, pieces, sent, matched):
    assert feed(stop, pieces)[:2] == (sent, matched)


@given(st.data())
def test_steps_of_any_size_add_up(data):
    text = data.draw(st.text(max_size=60))
    tokenizer = byte_tokenizer()
    tokens, pieces = tokenizer.encode_chat(text), []
    detokenizer = tokenizer.detokenizer([65])
    while tokens:
        size = data.draw(st.integers(1, len(tokens)))
        pieces.append(detokenizer.steps(tokens[:size]))
        tokens = tokens[size:]
    assert "".join(pieces) + detokenizer.flush() == text


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
def test_stop_finder_against_the_plain_search(stop, pieces):
    """At each piece: what was sent is a prefix of the text before any match, and a match is found at once."""
    sent, matched, index = feed(stop, pieces)
    text = "".join(pieces[: index + 1])
    firsts = [text.find(s) for s in stop if s in text]
    if matched is None:
        assert not firsts
        assert "".join(sent) == text
    else:
        assert "".join(sent) == text[: min(firsts)]
        assert not any(s in "".join(pieces[:index]) for s in stop)


def test_no_stop_strings_cost_nothing():
    assert StopFinder(()).step("text") == Piece("text")


def test_a_token_by_itself_keeps_its_space_and_special_ones_their_name():
    fallback, level = KINDS["byte fallback"], KINDS["byte level"]
    for tokenizer in (fallback, level):
        ids = tokenizer.encode("a a")
        shown = [tokenizer.shown(token) for token in ids]
        assert "".join(shown).strip() == "a a", "with a space before words, which a decoder takes off the first"
        assert any(text.startswith(" ") for text in shown)
    assert (BYTES.shown(BOS), BYTES.shown(0xC3), BYTES.shown(9999)) == ("<s>", "\ufffd", "")
