"""A checkpoint exists when its folder has its name and its manifest; everything before that is none."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite.checkpoint import storage

CONTENTS: dict[str, Any] = {
    "step": 40,
    "position": 320,
    "identity": {"model": {"dim": 256, "rope": None}, "debug.seed": 42},
    "files": {"__0_0.distcp": {"bytes": 3, "sha256": "ab"}},
    "lr": 0.1,
}


def _publish(folder: Path, step: int, contents: dict[str, Any] | None = None) -> Path:
    staging = storage.staging_folder(folder, step)
    staging.mkdir(parents=True)
    (staging / "__0_0.distcp").write_bytes(b"abc")
    final = storage.step_folder(folder, step)
    storage.publish(staging, final, CONTENTS if contents is None else contents)
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
    assert sorted(path.name for path in final.iterdir()) == ["__0_0.distcp", "manifest.json"]
    assert not storage.staging_folder(tmp_path, 40).exists()


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    final = _publish(tmp_path, 40)
    assert storage.read_manifest(final) == CONTENTS


def test_publishing_leaves_the_contents_alone(tmp_path: Path) -> None:
    contents = dict(CONTENTS)
    _publish(tmp_path, 40, contents)
    assert contents == CONTENTS


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
    ],
)
def test_an_edited_manifest_is_found_out(tmp_path: Path, edit: Any) -> None:
    final = _publish(tmp_path, 40)
    path = final / storage.MANIFEST
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"step-00000040/manifest\.json: contents do not match their checksum"):
        storage.read_manifest(final)


def test_a_manifest_that_was_cut_off_is_found_out(tmp_path: Path) -> None:
    path = _publish(tmp_path, 40) / storage.MANIFEST
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError):
        storage.read_manifest(path.parent)


def test_steps_are_ascending_numbers_with_a_manifest(tmp_path: Path) -> None:
    for step in (100, 5, 123_456_789, 20):
        _publish(tmp_path, step)
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    for name in ("step-9", "step-00000010.old", "xstep-00000011", ".step-00000012.removed", "notes"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    assert storage.published_steps(tmp_path) == [5, 20, 100, 123_456_789]


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


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        _publish(tmp_path, step)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.prune(tmp_path, 1)
    assert storage.published_steps(tmp_path) == [20]


def test_digests_are_size_and_sha256_of_the_files_with_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_BUFFER", 4)
    files = {"__0_0.distcp": b"", "__0_1.distcp": b"0123456789", "__10_0.distcp": b"x", ".metadata": b"meta"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def digest(name: str) -> dict[str, Any]:
        return {"bytes": len(files[name]), "sha256": sha256(files[name]).hexdigest()}

    assert storage.file_digests(tmp_path, "__0_") == {name: digest(name) for name in ("__0_0.distcp", "__0_1.distcp")}
    assert storage.file_digests(tmp_path, "__1_") == {}
    assert storage.file_digests(tmp_path, ".metadata") == {".metadata": digest(".metadata")}
