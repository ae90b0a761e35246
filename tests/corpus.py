"""Text for tests: sentences of a small made-up language, learnable in a few steps."""

import random
from pathlib import Path

_NOUNS = ["river", "engine", "teacher", "garden", "market", "signal", "winter", "letter", "island", "copper"]
_VERBS = ["follows", "repairs", "carries", "measures", "forgets", "paints", "answers", "crosses"]
_PLACES = ["at dawn", "near the gate", "in the valley", "without a word", "after the storm"]


def write_corpus(folder: Path, documents: int = 40, sentences: int = 60) -> Path:
    """Write `documents` files; the same bytes on every machine."""
    draw = random.Random(7)
    for index in range(documents):
        lines = [
            f"The {draw.choice(_NOUNS)} {draw.choice(_VERBS)} {draw.randint(2, 99)} {draw.choice(_NOUNS)}s "
            f"{draw.choice(_PLACES)}."
            for _ in range(sentences)
        ]
        (folder / f"document-{index:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
