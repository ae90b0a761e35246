"""A checkpoint exists when its folder has its name and its manifest; everything before that is none."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from xxhash import xxh3_128

from tests.checkpoint.reading import contents
from torchtitan_lite.checkpoint import storage
from torchtitan_lite.errors import UserError

FILE = storage.file_of(0)
CONTENTS = contents(40, lr=0.1, files={FILE: {"bytes": 3, "xxh3_128": xxh3_128(b"abc").hexdigest()}})


def _publish(folder: Path, step: int, **changes: Any) -> Path:
    staging = storage.staging_folder(folder, step)
    staging.mkdir(parents=True)
    (staging / FILE).write_bytes(b"abc")
    final = storage.step_folder(folder, step)
    storage.publish(staging, final, {**CONTENTS, "step": step, **changes})
    return final


def test_a_folder_in_the_making_is_no_checkpoint(tmp_path: Path) -> None:
    staging = storage.staging_folder(tmp_path, 40)
    staging.mkdir()
    assert storage.published_steps(tmp_path) == []
    (staging / storage.MANIFEST).write_text(json.dumps(CONTENTS))
    assert storage.published_steps(tmp_path) == []


def test_a_published_checkpoint_has_its_files_and_its_name(tmp_path: Path) -> None:
    final = _publish(tmp_path, 40)
    assert final == tmp_path / "step-00000040"
    assert storage.published_steps(tmp_path) == [40]
    assert sorted(path.name for path in final.iterdir()) == ["manifest.json", FILE]
    assert not storage.staging_folder(tmp_path, 40).exists()


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    final = _publish(tmp_path, 40)
    assert storage.read_manifest(final) == CONTENTS


def test_publishing_over_another_checkpoint_sets_that_aside(tmp_path: Path) -> None:
    for tokens in (1, 2, 3):
        _publish(tmp_path, 40, tokens_seen=tokens)
    told = {path.name: json.loads((path / storage.MANIFEST).read_text())["tokens_seen"] for path in tmp_path.iterdir()}
    assert told == {"step-00000040": 3, "step-00000040.superseded": 1, "step-00000040.superseded-2": 2}


def test_the_checksum_does_not_depend_on_layout_or_order(tmp_path: Path) -> None:
    final = _publish(tmp_path, 40)
    written = json.loads((final / storage.MANIFEST).read_text())
    shuffled = dict(sorted(written.items(), reverse=True))
    (final / storage.MANIFEST).write_text(json.dumps(shuffled, indent=7))
    assert storage.read_manifest(final) == CONTENTS


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest | {"step": 41},
        lambda manifest: manifest | {"more": 1},
        lambda manifest: {key: value for key, value in manifest.items() if key != "position"},
        lambda manifest: {key: value for key, value in manifest.items() if key != "sha256"},
        lambda manifest: manifest | {"sha256": "0" * 64},
        lambda manifest: manifest | {"identity": {"model": {"dim": 512, "rope": None}, "debug.seed": 42}},
        lambda manifest: [manifest],
    ],
)
def test_an_edited_manifest_is_found_out(tmp_path: Path, edit: Any) -> None:
    final = _publish(tmp_path, 40)
    path = final / storage.MANIFEST
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"step-00000040/manifest\.json: expected SHA-256"):
        storage.read_manifest(final)


def test_a_manifest_that_was_cut_off_is_found_out(tmp_path: Path) -> None:
    path = _publish(tmp_path, 40) / storage.MANIFEST
    path.write_text(path.read_text()[:-20])
    with pytest.raises(storage.Damaged, match="is not JSON"):
        storage.read_manifest(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 41}, "expected step 40 by its folder's name, found 41"),
        ({"position": "7"}, "expected position of type int, at least 0, found '7'"),
        ({"step": True}, "expected step of type int, at least 0, found True"),
        ({"global_batch_size": -1}, "expected global_batch_size of type int, at least 0, found -1"),
        ({"files": {"../../secret": {"bytes": 1, "xxh3_128": "ab"}}}, "lists a file '../../secret'"),
        ({"files": {"rank-00000.safetensors/..": {"bytes": 1, "xxh3_128": "ab"}}}, "lists a file"),
        ({"files": {FILE: {"bytes": "3", "xxh3_128": "ab"}}}, "expected bytes and xxh3_128 of"),
        ({"files": {FILE: {"bytes": 3}}}, "expected bytes and xxh3_128 of"),
        ({"files": {FILE: 3}}, "expected bytes and xxh3_128 of"),
    ],
    ids=str,
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Its own checksum is right: somebody wrote it so."""
    staging, final = storage.staging_folder(tmp_path, 40), storage.step_folder(tmp_path, 40)
    staging.mkdir()
    storage.publish(staging, final, {**CONTENTS, **change})
    with pytest.raises(storage.Damaged, match=re.escape(message)):
        storage.read_manifest(final)


def test_a_manifest_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = _publish(tmp_path, 40) / storage.MANIFEST
    path.write_text("[" * 100_000)
    with pytest.raises(storage.Damaged, match="is nested too deep"):
        storage.read_manifest(path.parent)


def test_a_bad_file_is_named_with_what_was_expected_and_found(tmp_path: Path) -> None:
    final = _publish(tmp_path, 40)
    path, good = final / FILE, xxh3_128(b"abc").hexdigest()[:12]
    expected = f"{path}: expected 3 bytes with XXH3 {good}..., "
    assert storage.verified(final) == []
    path.write_bytes(b"abd")
    assert storage.verified(final) == [f"{expected}found XXH3 {xxh3_128(b'abd').hexdigest()[:12]}..."]
    path.write_bytes(b"ab")
    assert storage.verified(final) == [f"{expected}found 2 bytes"]
    path.unlink()
    assert storage.verified(final) == [f"{expected}found no such file"]
    path.mkdir()
    assert storage.verified(final)[0].startswith(expected)
    (final / storage.MANIFEST).unlink()
    assert storage.verified(final) == [f"{final / storage.MANIFEST}: cannot be read: No such file or directory"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.EACCES])
def test_what_may_be_good_and_cannot_be_read_is_not_called_bad(tmp_path: Path, number: int) -> None:
    folder = _publish(tmp_path, 40)
    for owner, name in ((Path, "read_text"), (Path, "stat"), (Path, "open")):
        error = OSError(number, os.strerror(number))
        with patch.object(owner, name, side_effect=error), pytest.raises(UserError, match="and start again"):
            storage.verified(folder)


def test_what_a_disk_does_not_give_back_is_bad(tmp_path: Path) -> None:
    folder = _publish(tmp_path, 40)
    with patch.object(Path, "open", side_effect=OSError(errno.EIO, "Input/output error")):
        assert "cannot be read: Input/output error" in storage.verified(folder)[0]


def test_a_file_larger_than_the_buffer_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BUFFER", 2)
    final = _publish(tmp_path, 40)
    assert storage.verified(final) == []
    (final / FILE).write_bytes(b"abd")
    assert len(storage.verified(final)) == 1


def test_left_overs_are_told_and_taken_away(tmp_path: Path) -> None:
    _publish(tmp_path, 40)
    names = [".step-00000041.partial", ".step-00000030.removed"]
    for name in (*names, "notes", ".partial", "step-00000040.bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text("")
    assert storage.take_away_left_overs(tmp_path) == sorted(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".partial",
        "notes",
        "step-00000040",
        "step-00000040.bad",
    ]
    assert storage.take_away_left_overs(tmp_path / "nowhere") == []


def test_steps_are_ascending_numbers_of_folders(tmp_path: Path) -> None:
    for step in (100, 5, 123_456_789, 20):
        _publish(tmp_path, step)
    (tmp_path / "step-00000007").mkdir()  # without a manifest: somebody took it away
    (tmp_path / "step-00000008").write_text("a file")
    for name in ("step-9", "step-00000010.old", "xstep-00000011", ".step-00000012.removed", "notes"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    assert storage.published_steps(tmp_path) == [5, 7, 20, 100, 123_456_789]


def test_a_missing_folder_holds_no_checkpoints(tmp_path: Path) -> None:
    assert storage.published_steps(tmp_path / "nowhere") == []
    (tmp_path / "file").write_text("")
    assert storage.published_steps(tmp_path / "file") == []


@pytest.mark.parametrize(
    ("keep", "removed", "left"),
    [(1, [10, 20, 30], [40]), (2, [10, 20], [30, 40]), (4, [], [10, 20, 30, 40]), (9, [], [10, 20, 30, 40])],
)
def test_pruning_keeps_the_latest(tmp_path: Path, keep: int, removed: list[int], left: list[int]) -> None:
    for step in (30, 10, 40, 20):
        _publish(tmp_path, step)
    assert storage.prune(tmp_path, keep) == removed
    assert storage.published_steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left), "no part of what was removed is left"


def test_zero_keeps_all(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        _publish(tmp_path, step)
    assert storage.prune(tmp_path, 0) == []
    assert storage.published_steps(tmp_path) == [10, 20, 30]


def test_pruning_does_not_touch_what_is_no_checkpoint(tmp_path: Path) -> None:
    storage.staging_folder(tmp_path, 5).mkdir()
    (tmp_path / "step-00000006").mkdir()
    for step in (10, 20):
        _publish(tmp_path, step)
    storage.prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".step-00000005.partial",
        "step-00000006",
        "step-00000020",
    ]


def test_pruning_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _publish(tmp_path, step)
    (storage.step_folder(tmp_path, 40) / FILE).write_bytes(b"ab")
    (storage.step_folder(tmp_path, 30) / FILE).unlink()
    assert storage.prune(tmp_path, 1) == [10]
    assert storage.published_steps(tmp_path) == [20, 30, 40]


def test_pruning_leaves_one_to_resume_from(tmp_path: Path) -> None:
    for step in (10, 20):
        _publish(tmp_path, step)
    _publish(tmp_path, 30, holds="model")
    assert storage.prune(tmp_path, 1) == [10]
    assert storage.published_steps(tmp_path) == [20, 30]


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        _publish(tmp_path, step)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.prune(tmp_path, 1)
    assert storage.published_steps(tmp_path) == [20]
