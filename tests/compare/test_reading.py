"""Run folders as they are found: what is read of them, and what is wrong with those that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compare.folders import write_run
from torchtitan_lite.compare.document import document
from torchtitan_lite.compare.runs import read_run
from torchtitan_lite.compare.sides import Source, gather
from torchtitan_lite.errors import UserError

Change = Callable[[dict[str, Any]], object]


def _config(folder: Path, change: Change) -> None:
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))


def _line(folder: Path, **values: Any) -> None:
    """The tenth line of the run's metrics with other values."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[9] = json.dumps({**json.loads(lines[9]), **values})
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _event(folder: Path, **values: Any) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0.0, "step": 80, "attempt": 1, **values}) + "\n")


def _compared(*sources: Path) -> dict[str, Any]:
    sides, failed = gather([Source(str(source)) for source in sources], 2, None)
    return document(sides, failed, [], [], {"steps": None, "repeats": None, "target_loss": None})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record["config"].pop("debug"), r"config\.debug\.seed: .*got nothing"),
        (lambda record: record["config"].pop("model"), r"config\.model\.name: .*got nothing"),
        (lambda record: record["config"]["training"].pop("steps"), r"training\.steps: .*got nothing"),
        (lambda record: record["config"]["training"].update(steps="80"), r'training\.steps: .*, got "80"'),
        (lambda record: record["config"]["training"].update(steps=True), r"training\.steps: .*, got true"),
        (lambda record: record["config"]["training"].update(seq_len=0), r"training\.seq_len: .* at least 1, got 0"),
        (lambda record: record["config"].update(metrics="none"), r'config\.metrics: expected an object, got "none"'),
        (lambda record: record.update(identity=None), "identity: .*got null"),
        (lambda record: record.update(identity=["data"]), r'identity: expected an object, got \["data"\]'),
        (lambda record: record.update(versions=None), "versions: .*got null"),
        (lambda record: record.update(filled=[["a"]]), "filled: expected a list of strings"),
        (lambda record: record.update(world_size=0), "world_size: .* at least 1, got 0"),
        (lambda record: record.update(world_size=float("inf")), "not a config.json of ours"),
    ],
)
def test_a_config_of_another_version_is_named(tmp_path: Path, change: Change, told: str) -> None:
    folder = write_run(tmp_path / "run")
    _config(folder, change)
    with pytest.raises(UserError, match=rf"config\.json: .*{told}"):
        read_run(folder)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"step_time_s": 0}, "step_time_s is 0"),
        ({"step_time_s": "NaN"}, 'step_time_s is "NaN"'),
        ({"step": float("inf")}, "step is Infinity"),
        ({"step": None, "tps": "fast"}, 'step is missing, tps is "fast"'),
        ({"memory_peak_gib": [1]}, r"memory_peak_gib is \[1\]"),
        ({"loss": {"a": "x" * 100}}, r"loss is .{57}\.\.\.;"),
    ],
)
def test_a_line_that_is_spoilt_is_named(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    folder = write_run(tmp_path / "run")
    _line(folder, **values)
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 10: {told}"):
        read_run(folder)


def test_an_mfu_is_that_of_the_steps_whose_times_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:12]]
    rates = [0.1, None, *[0.4, 0.5] * 5]  # the first step has caches to fill
    told = [json.dumps({**line, "mfu": rate}) for line, rate in zip(lines, rates, strict=True)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in told))
    assert read_run(folder).mfu() == pytest.approx(0.45)


def test_losses_and_norms_may_be_no_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    _line(folder, loss="NaN", grad_norm="Infinity")
    assert str(read_run(folder).curve["loss"][9]) == "nan"


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ({"event": "profile", "step_breakdown": {"compute_s": 0.1, "idle_s": None}}, "step_breakdown is .*null"),
        ({"event": "profile", "step_breakdown": 3}, "step_breakdown is 3"),
        ({"event": "end", "memory_peak_gib": [0.5, None]}, r"memory_peak_gib is \[0\.5, null\]"),
        ({"event": "end", "memory_peak_gib": 1}, "memory_peak_gib is 1"),
    ],
)
def test_an_event_that_is_spoilt_is_named(tmp_path: Path, event: dict[str, Any], told: str) -> None:
    folder = write_run(tmp_path / "run")
    _event(folder, **event)
    with pytest.raises(UserError, match=rf"events\.jsonl: {told}"):
        read_run(folder)


@pytest.mark.parametrize("mark", ['{"first_step_s": "soon"}', '{"started": NaN}', "[1]", "null", "{", '"\\ud800"'])
def test_a_mark_that_no_comparison_wrote_is_named(tmp_path: Path, mark: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "compare.json").write_text(mark)
    with pytest.raises(UserError, match=r"compare\.json: cannot be read"):
        read_run(folder)


def test_files_that_cannot_be_read_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    spoilt, folder = write_run(tmp_path / "spoilt"), write_run(tmp_path / "folder")
    with (spoilt / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "\xff"}\n')
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    record = _compared(a, spoilt, folder, b)
    assert [(pair["a"], pair["b"]) for pair in record["pairs"]] == [("A", "D")]
    assert [each["name"] for each in record["failed"]] == ["B", "C"]
    assert "events.jsonl, line 3: is not JSON" in record["failed"][0]["told"]
    assert "metrics.jsonl: cannot be read: Is a directory" in record["failed"][1]["told"]


def test_the_last_line_of_a_step_counts_and_later_ones_before_it_do_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    again = json.dumps({**json.loads(lines[5]), "loss": 7.0}) + "\n"
    (folder / "metrics.jsonl").write_text("".join([*lines[:9], again]))
    curve = read_run(folder).curve
    assert curve["step"] == [1, 2, 3, 4, 5, 6]
    assert curve["loss"][5] == 7.0


def test_the_files_that_a_runs_recipe_extends_are_shown(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    _config(a, lambda record: record.update(recipe="mine.toml", extends=["base.toml", "root.toml"]))
    sides = _compared(a, b)["sides"]
    assert sides[0]["chain"] == ["mine.toml", "base.toml", "root.toml"]
    assert sides[1]["chain"] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record["identity"].update(data="another"), "differ in data,"),
        (lambda record: record["versions"].update(torch="2.14.0"), "differ in version of torch,"),
        (lambda record: record.update(world_size=4), "differ in ranks,"),
        (lambda record: record.update(device="NVIDIA H100"), "differ in device,"),
    ],
)
def test_runs_of_other_circumstances_are_no_repeats(tmp_path: Path, change: Change, told: str) -> None:
    write_run(tmp_path / "both" / "x")
    _config(write_run(tmp_path / "both" / "y", seed=43), change)
    sides, failed = gather([Source(str(tmp_path / "both"))], 2, None)
    assert sides == []
    assert told in failed[0][1]


def test_what_is_a_runs_own_makes_no_other_repeat(tmp_path: Path) -> None:
    for seed in (42, 43):
        own = {"debug.seed": seed, "checkpoint.folder": f"checkpoint-{seed}"}
        run = write_run(tmp_path / "both" / str(seed), seed=seed)
        _config(run, lambda record, own=own: record["identity"].update(own))  # type: ignore[misc]
    (side,), _ = gather([Source(str(tmp_path / "both"))], 2, None)
    assert len(side.runs) == 2


def test_peaks_by_rank_and_what_is_sent_are_told(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for folder, peaks, sent in ((a, [0.5, 0.6], 0.02), (b, [0.25, 0.75], 0.03)):
        _event(folder, event="traffic", sent_gib=sent)
        _event(folder, event="end", memory_peak_gib=peaks)
    record = _compared(a, b)
    assert [side["summary"]["memory_by_rank"] for side in record["sides"]] == [[0.5, 0.6], [0.25, 0.75]]
    assert record["pairs"][0]["communication"] == {"a_gib": 0.02, "b_gib": 0.03, "ratio": pytest.approx(1.5)}
    assert "The first rank of B sends 0.03 GiB a step, 1.50 times 0.02." in record["words"]


def test_peaks_of_an_attempt_before_the_last_do_not_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end=False)
    _event(folder, event="end", memory_peak_gib=[0.5, 0.6])
    assert read_run(folder).memory_by_rank == [0.5, 0.6]
    _event(folder, event="start")
    assert read_run(folder).memory_by_rank is None


def test_parts_of_a_step_that_not_all_repeats_have_are_left_out(tmp_path: Path) -> None:
    for seed, parts in ((42, {"compute_s": 0.2, "idle_s": 0.1}), (43, {"compute_s": 0.4})):
        _event(write_run(tmp_path / "a" / str(seed), seed=seed), event="profile", step_breakdown=parts)
    summary = _compared(tmp_path / "a", write_run(tmp_path / "b"))["sides"][0]["summary"]
    assert summary["breakdown"] == {"compute_s": pytest.approx(0.3)}


def test_tokens_per_second_are_of_a_rank_and_of_all(tmp_path: Path) -> None:
    summary = _compared(write_run(tmp_path / "a"), write_run(tmp_path / "b"))["sides"][0]["summary"]
    assert summary["tokens_per_s"] == pytest.approx(2048 / 0.4)
    assert summary["tps"] == pytest.approx(1024 / 0.4)
