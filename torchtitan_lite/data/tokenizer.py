"""A sentencepiece tokenizer without loss: decode(encode(text)) == text for any text UTF-8 can hold.

Plain sentencepiece writes a space as U+2581 and so cannot tell the two apart. Here a literal U+2581 goes
in as its three bytes, and decoding joins bytes itself.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import sentencepiece

from torchtitan_lite.errors import UserError

_SPACE = "\u2581"
_CHUNK = 1000  # characters; what the trainer sees as a sentence, line ends included
# The number goes into the model file: the same on every machine, or the same corpus gives another fingerprint.
_TRAINER_THREADS = 4
# U+2581 and U+2585 are the trainer's own marks for a space and for an unknown piece; NUL ends its strings.
_TRAINER_MARKS = str.maketrans({_SPACE: " ", "\u2585": " ", "\0": " "})
_PROBE = " two  spaces\tand\n\nlines, \ufb01ne "


class Tokenizer:
    """vocab_size: ids run from 0 to vocab_size - 1. bos_id, eos_id: ids around a document.
    fingerprint: SHA-256 of the model file."""

    def __init__(self, model: bytes, name: str) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
        except (RuntimeError, OSError):
            raise UserError(f'model.tokenizer_path = "{name}": is no sentencepiece model') from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.fingerprint = sha256(model).hexdigest()
        self._space_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if not all(self._model.is_byte(index) for index in self._space_ids):
            raise UserError(f'model.tokenizer_path = "{name}": has no byte pieces; train it with byte_fallback=true')
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f'model.tokenizer_path = "{name}": has no begin or end piece; train it with both')
        self._bytes = [self._surface(index) for index in range(self.vocab_size)]

    def keeps_text(self) -> bool:
        """Whether white space and ligatures survive: false for a foreign model that normalises."""
        return self.decode(self.encode(_PROBE)) == _PROBE

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin and end."""
        return self.encode_all([text], threads=1)[0]

    def encode_all(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text, on `threads` threads."""
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=threads)
        for index, text in enumerate(texts):
            if _SPACE in text:
                encoded[index] = self._encode_with_marks(text)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; begin and end give nothing, bytes that are no UTF-8 give U+FFFD."""
        return b"".join(self._bytes[index] for index in ids).decode("utf-8", errors="replace")

    def _encode_with_marks(self, text: str) -> list[int]:
        first, *others = self._model.encode(text.split(_SPACE))
        for part in others:
            first += self._space_ids + part
        return list(first)

    def _surface(self, index: int) -> bytes:
        if self._model.is_control(index):
            return b""
        piece: str = self._model.id_to_piece(index)
        if self._model.is_byte(index):
            return bytes([int(piece[1:-1], 16)])
        if self._model.is_unknown(index):
            return "\ufffd".encode()
        return piece.replace(_SPACE, " ").encode()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a sentencepiece .model file. Raises UserError where it is not one that we can use."""
    try:
        return Tokenizer(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f'model.tokenizer_path = "{path}": cannot be read: {error.strerror}') from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-pair encoding (arXiv:1508.07909) with byte fallback on `texts`; return the model file.

    Raises UserError where the texts are too few for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        # sentencepiece puts its own condition in brackets before the reason, if it gives one.
        reason = re.sub(r".*\] ?", "", str(error).split("\n")[0]) or "Too little text."
        raise UserError(
            f"the corpus gives no tokenizer of {vocab_size} pieces: {reason} Use more text, or set model.tokenizer_path"
        ) from None
    return model.getvalue()


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        clean = text.translate(_TRAINER_MARKS)
        for start in range(0, len(clean), _CHUNK):
            yield clean[start : start + _CHUNK]
