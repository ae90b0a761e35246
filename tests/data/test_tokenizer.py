"""Text comes back from its tokens as it went in, whatever it holds."""

import io
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_lite.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from torchtitan_lite.errors import UserError

MARK = "\u2581"  # what sentencepiece writes for a space

EXPLICIT = [
    "",
    " ",
    "  ",
    " leading",
    "trailing ",
    "  both  ",
    "many     spaces   within",
    "\t",
    "\ttabs\t\tand\t",
    "\n",
    "\n\nlines\n",
    "\r\n",
    "dos\r\nlines\r\n",
    "old\rmac",
    "\0",
    "a\0b\0",
    MARK,
    MARK * 3,
    f"{MARK}a",
    f"a{MARK}",
    f" {MARK} ",
    f"a {MARK}{MARK} b{MARK}c",
    f"\0{MARK}\n{MARK}\t",
    "\u2585\u2047\ufffd",  # the trainer's own marks for unknown characters
    "😀",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 is not \u00e9",
    "Ångström ﬁ ½ ｆｕｌｌ",
    "日本語とعربى и हिन्दी",
    "\u00a0\u2003\u3000\u200b\ufeff",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0xE2><0x96><0x81>",
    "<s>text</s><unk>",
    "0123456789 1e-10",
    "\U0010ffff\U00010000",
    "\x01\x1b[0m\x7f\x80",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(3)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(400)]
    return [
        " ".join(draw.choice(words) for _ in range(30)) + f"\n\tline {index}  <s> {index % 7}</s>\r\n"
        for index in range(200)
    ]


@pytest.fixture(scope="module")
def model(texts: list[str]) -> bytes:
    return train_tokenizer(texts, vocab_size=320)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer(model, "test")


def test_a_trained_model_has_the_pieces_asked_for(tokenizer: Tokenizer, model: bytes) -> None:
    assert tokenizer.vocab_size == 320
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.fingerprint == sha256(model).hexdigest()


def test_training_twice_gives_the_same_model(texts: list[str], model: bytes) -> None:
    assert train_tokenizer(texts, vocab_size=320) == model


def test_training_has_learnt_pieces_longer_than_a_character(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert len(tokenizer.encode(texts[0])) < 0.8 * len(texts[0])


@pytest.mark.parametrize("text", EXPLICIT)
def test_odd_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.sampled_from([MARK, " ", "e", "<", "s", ">", "\0", "\n", "é"]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_mix_of_marks_and_spaces_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_text_that_it_was_trained_on_comes_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    whole = "".join(texts)
    assert tokenizer.decode(tokenizer.encode(whole)) == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_many_texts_are_encoded_as_one_by_one(tokenizer: Tokenizer, texts: list[str], threads: int) -> None:
    mixed = EXPLICIT + texts[:50]
    assert tokenizer.encode_all(mixed, threads) == [tokenizer.encode(text) for text in mixed]


def test_no_texts_are_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_all([], threads=2) == []


def test_begin_and_end_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("some text")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.bos_id]) == "some text"


def test_a_character_cut_in_two_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert tokenizer.decode([*ids[:2], *tokenizer.encode("e")]) == "\ufffde"


def test_a_model_is_loaded_from_its_file(tmp_path: Path, model: bytes, tokenizer: Tokenizer) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    loaded = load_tokenizer(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the same ids") == tokenizer.encode("the same ids")


@pytest.mark.parametrize("content", [b"", b"no model", b"\0" * 100, b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_tokenizer(path)
    assert str(raised.value) == f'model.tokenizer_path = "{path}": is no sentencepiece model'


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^model\.tokenizer_path = ".*nowhere\.model": cannot be read: No such file'):
        load_tokenizer(tmp_path / "nowhere.model")


def _train_plain(texts: list[str], **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", minloglevel=2, **options
    )
    return model.getvalue()


def test_a_model_that_would_lose_characters_is_refused(texts: list[str]) -> None:
    model = _train_plain(texts, vocab_size=80)
    with pytest.raises(UserError, match="has no byte pieces; train it with byte_fallback=true"):
        Tokenizer(model, "test")


@pytest.mark.parametrize("missing", ["bos_id", "eos_id"])
def test_a_model_without_begin_or_end_is_refused(texts: list[str], missing: str) -> None:
    model = _train_plain(texts, vocab_size=320, byte_fallback=True, **{missing: -1})
    with pytest.raises(UserError, match="has no begin or end piece; train it with both"):
        Tokenizer(model, "test")


@pytest.mark.parametrize(
    ("some", "vocab_size"),
    [
        (["abc abc"], 2048),  # more pieces than the text has
        (["abc abc"], 100),  # fewer than the bytes need
        ([""], 320),
        ([], 320),
    ],
)
def test_a_vocabulary_that_the_corpus_does_not_give_is_refused(some: list[str], vocab_size: int) -> None:
    with pytest.raises(
        UserError,
        match=rf"^the corpus gives no tokenizer of {vocab_size} pieces: .*Use more text, or set model\.tokenizer_path$",
    ):
        train_tokenizer(some, vocab_size)


def test_a_long_line_is_trained_on_in_pieces(texts: list[str], model: bytes) -> None:
    # sentencepiece would skip a line of more than 4,192 bytes.
    line = "".join(texts).replace("\n", " ")
    tokenizer = Tokenizer(train_tokenizer([line], 320), "test")
    assert tokenizer.vocab_size == 320
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_marks_and_nul_in_the_corpus_do_not_stop_training(texts: list[str]) -> None:
    odd = [text.replace(" ", MARK, 3) + "\0" for text in texts]
    tokenizer = Tokenizer(train_tokenizer(odd, 320), "test")
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_all(odd, threads=1)] == odd


def test_a_model_that_normalises_is_found(texts: list[str]) -> None:
    assert Tokenizer(train_tokenizer(texts, vocab_size=320), "ours").keeps_text()
    stock = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=stock,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    assert not Tokenizer(stock.getvalue(), "stock").keeps_text()
