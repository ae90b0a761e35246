"""Samples of prepared tokens: how many there are, and what is refused where there are none."""

from pathlib import Path

import pytest

from torchtitan_lite.data.prepare import Prepared, Source, Split, require_samples
from torchtitan_lite.errors import UserError


@pytest.mark.parametrize(
    ("tokens", "seq_len", "samples"), [(0, 4, 0), (1, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2), (10, 1, 9)]
)
def test_samples_share_their_last_token_with_the_next(tokens: int, seq_len: int, samples: int) -> None:
    assert Split(("x",), tokens, 1).samples(seq_len) == samples


def _of_size(train: int, held_out: int) -> Prepared:
    parts = Split(("t",), train, 3), Split(("v",), held_out, 2)
    return Prepared((Source("s", Path("x"), Path("y"), "f", 300, 1, "g", "uint16", *parts),))


def test_a_part_without_a_whole_sample_is_refused() -> None:
    with pytest.raises(UserError) as raised:
        require_samples(_of_size(16, 100), 16, validating=False)
    assert str(raised.value) == (
        "training.seq_len = 16: the training part of the corpus has 16 tokens and a sample needs 17; "
        "use more text or a shorter seq_len"
    )
    with pytest.raises(UserError) as raised:
        require_samples(_of_size(17, 16), 16, validating=True)
    assert str(raised.value) == (
        "validation.enable = true: the held-out part has 2 documents with 16 tokens and a sample needs 17; "
        "raise data.validation_fraction or use more text"
    )


def test_parts_with_a_sample_pass_and_unused_ones_are_not_asked() -> None:
    require_samples(_of_size(17, 17), 16, validating=True)
    require_samples(_of_size(17, 0), 16, validating=False)
