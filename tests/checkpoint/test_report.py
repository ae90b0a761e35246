"""The checkpoint command: what it tells of good, bad and hostile folders, and that it changes nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from threading import Event, main_thread
from typing import Any

import pytest
import torch

from tests.checkpoint.reading import contents, flip_a_bit
from torchtitan_lite.checkpoint import report, storage
from torchtitan_lite.checkpoint.shards import Part, write_parts
from torchtitan_lite.errors import UserError

ROOT = Path(__file__).parents[2]


def _publish(folder: Path, step: int, **changes: Any) -> Path:
    """A checkpoint of two ranks: a matrix in two parts, a whole vector, a number, a random state."""
    staging = storage.staging_folder(folder, step)
    staging.mkdir(parents=True)
    matrix = torch.arange(12.0).view(4, 3)
    parts = [
        {
            "model.a.weight": Part(matrix[:2], (0, 0), (4, 3)),
            "optimizer.a.weight.step": Part(torch.tensor(6.0), (), ()),
            "rng.rank0.cpu": Part(torch.zeros(16, dtype=torch.uint8), (0,), (16,)),
        },
        {
            "model.a.weight": Part(matrix[2:], (2, 0), (4, 3)),
            "model.b": Part(torch.zeros(5, dtype=torch.bfloat16), (0,), (5,)),
        },
    ]
    files = {storage.file_of(rank): write_parts(staging / storage.file_of(rank), p) for rank, p in enumerate(parts)}
    final = storage.step_folder(folder, step)
    mesh = {"pp": 1, "dp_shard": 2}
    storage.publish(staging, final, contents(step, **{"world_size": 2, "mesh": mesh, "files": files, **changes}))
    return final


def _restated(folder: Path) -> None:
    """Write a manifest that is right about the files as they are now: a hostile hand can do so too."""
    manifest = storage.read_manifest(folder)
    for name, entry in manifest["files"].items():
        digest = storage.hasher()
        digest.update((folder / name).read_bytes())
        entry.update(bytes=(folder / name).stat().st_size, xxh3_128=digest.hexdigest())
    copy = storage.staging_folder(folder.parent, manifest["step"])
    folder.rename(copy)
    storage.publish(copy, folder, manifest)


def _told(capsys: pytest.CaptureFixture[str], action: str, path: Path, code: int = 0) -> Any:
    assert report.run(action, str(path), as_json=True) == code
    return json.loads(capsys.readouterr().out)


def _lines(capsys: pytest.CaptureFixture[str], action: str, path: Path, code: int = 0) -> list[str]:
    assert report.run(action, str(path), as_json=False) == code
    return capsys.readouterr().out.splitlines()


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_list_tells_checkpoints_from_what_is_left_over_or_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6, 8, 10, 12):
        _publish(tmp_path, step, holds="model" if step == 12 else "all")
    storage.set_aside(storage.step_folder(tmp_path, 2), "bad")
    storage.set_aside(storage.step_folder(tmp_path, 4), "superseded")
    storage.step_folder(tmp_path, 6).rename(tmp_path / ".step-00000006.removed")
    (storage.step_folder(tmp_path, 8) / storage.file_of(1)).unlink()
    (storage.step_folder(tmp_path, 10) / storage.MANIFEST).unlink()
    storage.staging_folder(tmp_path, 14).mkdir()
    (tmp_path / "notes").mkdir()
    rows = {row["name"]: row for row in _told(capsys, "list", tmp_path)}
    assert [(row["step"], row["stage"], row["complete"]) for row in rows.values()] == [
        (2, "bad", False),
        (4, "superseded", False),
        (6, "removed", False),
        (8, "checkpoint", False),
        (10, "checkpoint", False),
        (12, "checkpoint", True),
        (14, "partial", False),
    ]
    last = rows["step-00000012"]
    size = sum((tmp_path / "step-00000012" / storage.file_of(rank)).stat().st_size for rank in (0, 1))
    assert (last["holds"], last["world_size"], last["mesh"], last["files"], last["bytes"]) == (
        "model",
        2,
        {"pp": 1, "dp_shard": 2},
        2,
        size,
    )
    assert rows["step-00000008"]["why"].startswith("rank-00001.safetensors: expected ")
    assert rows["step-00000010"]["why"].endswith("manifest.json: cannot be read: No such file or directory")

    lines = _lines(capsys, "list", tmp_path)
    assert lines[0].split() == ["name", "holds", "saved", "ranks", "mesh", "GiB", "files", "complete"]
    assert lines[4].endswith("found no such file")
    assert lines[6].split()[-1] == "yes"
    assert "dp_shard 2" in lines[6]
    column = lines[0].index("complete")
    states = [line[column:].partition(":")[0] for line in lines[1:]]
    assert states == ["set aside", "set aside", "left over", "no", "no", "yes", "left over"]


def test_a_run_folder_says_where_its_checkpoints_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _publish(tmp_path / "run" / "checkpoint", 2)
    _publish(tmp_path / "run" / "elsewhere", 4)
    assert [row["step"] for row in _told(capsys, "list", tmp_path / "run")] == [2]
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({"config": {"checkpoint": {"folder": "elsewhere"}}}))
    assert [row["step"] for row in _told(capsys, "list", tmp_path / "run")] == [4]
    config.write_text('{"config": []}')
    with pytest.raises(UserError, match=r"config\.json: does not say checkpoint\.folder"):
        report.run("list", str(tmp_path / "run"), as_json=True)


@pytest.mark.parametrize("action", ["list", "verify", "inspect"])
def test_what_has_no_checkpoints_is_refused(tmp_path: Path, action: str) -> None:
    (tmp_path / "file").write_text("")
    for path, why in (("", "has no checkpoints"), ("none", "no such folder"), ("file", "no such folder")):
        with pytest.raises(UserError, match=f"{why}; name a checkpoint, a folder of some, or a run folder"):
            report.run(action, str(tmp_path / path), as_json=False)


@pytest.mark.parametrize("action", ["verify", "inspect"])
def test_left_overs_are_no_checkpoints(tmp_path: Path, action: str) -> None:
    storage.staging_folder(tmp_path, 2).mkdir()
    storage.staging_folder(tmp_path, 4).mkdir()
    with pytest.raises(UserError, match="has no checkpoints, only what is left over or set aside"):
        report.run(action, str(tmp_path), as_json=False)


def test_verify_reads_all_and_names_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, flipped, missing = (_publish(tmp_path, step) for step in (2, 4, 6))
    size = report._row(2, "checkpoint", good)["bytes"]
    told = _told(capsys, "verify", tmp_path)
    assert (told["good"], told["bad"], told["bytes"]) == (3, 0, 3 * size)
    flip_a_bit(flipped / storage.file_of(1))
    (missing / storage.file_of(0)).unlink()
    before = _snapshot(tmp_path)
    told = _told(capsys, "verify", tmp_path, code=1)
    assert [row["state"] for row in told["checkpoints"]] == ["good", "bad", "bad"]
    (damage,) = told["checkpoints"][1]["damages"]
    assert damage.startswith(f"{flipped / storage.file_of(1)}: expected ")
    assert "found XXH3" in damage
    lines = _lines(capsys, "verify", tmp_path, code=1)
    assert lines[0] == f"good  {good}"
    assert lines[1].startswith(f"bad   {flipped / storage.file_of(1)}: expected ")
    assert lines[2].endswith("found no such file")
    assert lines[3].startswith("1 good, 2 bad; read ")
    assert lines[3].endswith(" GB/s")
    assert _snapshot(tmp_path) == before
    # One alone, and one that was set aside, by its name.
    assert _told(capsys, "verify", good)["good"] == 1
    assert _told(capsys, "verify", storage.set_aside(flipped, "bad"), code=1)["bad"] == 1
    assert _told(capsys, "verify", good.rename(tmp_path / "kept"))["good"] == 1


def test_a_folder_with_its_final_name_and_no_manifest_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (_publish(tmp_path, 2) / storage.MANIFEST).unlink()
    _publish(tmp_path, 4)
    told = _told(capsys, "verify", tmp_path, code=1)
    assert [row["state"] for row in told["checkpoints"]] == ["bad", "good"]


def test_a_checkpoint_that_is_removed_meanwhile_is_not_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    final, verified = _publish(tmp_path, 2), storage.verified

    def removed_first(folder: Path, on_read: Any) -> list[str]:
        shutil.rmtree(folder)
        return verified(folder, on_read)

    monkeypatch.setattr(storage, "verified", removed_first)
    assert _lines(capsys, "verify", final)[0] == f"gone  {final}: removed meanwhile"


@pytest.fixture
def interruptible() -> Iterator[None]:
    # A shell starts what it runs in the background with SIGINT ignored, and Python leaves that as it is.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_wait_for_the_end_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = Event()
    monkeypatch.setattr(storage, "_BUFFER", 16)
    monkeypatch.setattr(storage, "Event", lambda: given_up)
    final, reads = _publish(tmp_path, 2), []

    def interrupt(count: int) -> None:
        reads.append(count)
        if len(reads) > 1:
            assert given_up.wait(30)
            return
        # Again, as one who waits would: what comes just before the main thread sleeps does not wake it.
        for _ in range(100):
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
            if given_up.wait(0.3):
                return
        raise AssertionError("an interrupt was not heard")

    with pytest.raises(KeyboardInterrupt):
        storage.verified(final, interrupt)
    assert len(reads) <= 2  # one of each file, of which there are two


def test_inspect_says_what_a_checkpoint_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _publish(tmp_path, 2)
    newest = _publish(tmp_path, 4)
    told = _told(capsys, "inspect", tmp_path)
    assert (told["path"], told["step"], told["position"], told["tokens_seen"]) == (str(newest), 4, 32, 1024)
    assert told["tensors"] == [
        {"name": "model.a.weight", "dtype": "F32", "shape": [4, 3], "parts": 2, "bytes": 48},
        {"name": "model.b", "dtype": "BF16", "shape": [5], "parts": 1, "bytes": 10},
        {"name": "optimizer.a.weight.step", "dtype": "F32", "shape": [], "parts": 1, "bytes": 4},
        {"name": "rng.rank0.cpu", "dtype": "U8", "shape": [16], "parts": 1, "bytes": 16},
    ]
    assert told["totals"] == {
        "model": {"tensors": 2, "numbers": 17, "bytes": 58},
        "optimizer": {"tensors": 1, "numbers": 1, "bytes": 4},
        "rng": {"tensors": 1, "numbers": 16, "bytes": 16},
    }
    text = "\n".join(_lines(capsys, "inspect", newest))
    for line in (
        r"  mesh +dp_shard 2",
        r"  identity\.model\.rope +-",
        r"model\.a\.weight +F32 +4 x 3 +2 +48",
        r"optimizer\.a\.weight\.step +F32 +one number +1 +4",
        r"model +2 +17 +0\.000",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), f"{line}\n{text}"


def _header(edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Path], None]:
    """What rewrites the header of a file, and where its parts lie, and keeps the numbers."""

    def rewrite(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        places = json.loads(header["__metadata__"]["chunks"])
        edit(header, places)
        header["__metadata__"] = {"chunks": json.dumps(places)}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return rewrite


def _nested(path: Path) -> None:
    text = b'{"__metadata__":{"chunks":"' + b"[" * 100_000 + b'"}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HOSTILE = {
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(b"\xff" * 64),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cposix\nsystem\n(X\x02\x00\x00\x00lstR."),
    "not plain": _fifo,
    "nested": _nested,
    "no places": _header(lambda header, places: places.clear()),
    "a place outside": _header(lambda header, places: places["model.b"][0].__setitem__(0, 7)),
    "an infinite place": _header(lambda header, places: places["model.b"][1].__setitem__(0, float("inf"))),
    "half a number": _header(lambda header, places: places["model.b"][1].__setitem__(0, 5.5)),
    "a huge shape": _header(lambda header, places: places["model.b"][1].__setitem__(0, 10**4000)),
    "another shape": _header(lambda header, places: places["model.a.weight"].__setitem__(1, [4, 4])),
    "another type": _header(lambda header, places: header["model.a.weight"].update(dtype="I32")),
    "bytes outside": _header(lambda header, places: header["model.b"].update(data_offsets=[1 << 40, (1 << 40) + 10])),
    "a gap": _header(lambda header, places: (header.pop("model.a.weight"), places.pop("model.a.weight"))),
    "steering names": _header(
        lambda header, places: (
            header.update({"\x1b[2Jmodel.b": header.pop("model.b")}),
            places.update({"\x1b[2Jmodel.b": [[9], [5]]}),
        )
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    final = _publish(tmp_path, 2)
    HOSTILE[how](final / storage.file_of(1))
    if how != "not plain":
        _restated(final)
    for as_json in (False, True):
        assert report.run("inspect", str(final), as_json) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {final}")
        assert err.count("\n") == 1
        assert err.strip().isprintable()
        assert len(err) < 500


def test_names_cannot_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = _publish(tmp_path, 2, identity={"model": "\x1b[2J", "\ud800": 1}, mesh={"\x1b": 2})
    name = "\x1b[31mmodel.b"
    rename = _header(
        lambda header, places: (header.update({name: header.pop("model.b")}), places.update({name: [[0], [5]]}))
    )
    rename(final / storage.file_of(1))
    _restated(final)
    for action in ("list", "inspect"):
        lines = _lines(capsys, action, final)
        assert all(line.isprintable() for line in lines)
        assert any("\\x1b" in line for line in lines)


@pytest.mark.parametrize("depth", [200, 470, 900, 960, 100_000])
def test_a_manifest_that_is_nested_is_shown_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int
) -> None:
    final = _publish(tmp_path, 2, identity={"deep": "here"})
    manifest = storage.read_manifest(final)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    text = text.replace('"here"', '{"a":' * depth + "1" + "}" * depth)
    stated = f'{text[:-1]},"sha256":"{sha256(text.encode()).hexdigest()}"}}'
    (final / storage.MANIFEST).write_text(stated)
    for as_json in (False, True):
        code = report.run("inspect", str(final), as_json)  # how deep is too deep depends on the interpreter
        assert code == 1 if depth == 100_000 else code in (0, 1)
        err = capsys.readouterr().err
        assert err == (f"error: {final / storage.MANIFEST}: is nested too deep\n" if code else "")


@pytest.mark.parametrize("action", ["list", "verify", "inspect"])
def test_no_torch_is_needed(tmp_path: Path, action: str) -> None:
    _publish(tmp_path, 2)
    program = "import sys; from torchtitan_lite.checkpoint import report; report.run(*sys.argv[1:], as_json=True); "
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, action, str(tmp_path)], cwd=ROOT, check=True, timeout=60)
