"""TensorBoard's events, as its own readers and its server take them."""

import struct
import time
import zlib
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_file_loader

from tests.observability.boards import Served, histograms, read, scalars, served
from torchtitan_lite.observability.bar import COLOURS, stacked_bar
from torchtitan_lite.observability.sinks import RunLog
from torchtitan_lite.observability.tensorboard import About, Setting, TensorBoard, scalars_of

RECORD = {
    "step": 7,
    "loss": 2.5,
    "grad_norm": 0.75,
    "lr": 0.125,
    "tokens_seen": 4096,
    "step_time_s": 0.5,
    "data_time_s": 0.125,
    "tps": 1024.0,
    "tflops": 3.5,
    "mfu": 0.25,
    "mfu_float8": 0.125,
    "memory_peak_gib": 1.5,
    "moe_aux_loss": None,
    "moe_entropy": 0.875,
    "moe_dropped": 3,
    "moe_tokens_per_expert": [[1, 2]],
}


def _about(lr: float = 0.5, model: str = "tiny") -> About:
    settings = (Setting("model", "model", model), Setting("optimizer.lr", "lr", lr), Setting("compile", "c", True))
    return About(settings, "Recipe `a.toml`\n\n```toml\n[optimizer]\nlr = 0.5\n```\n", "cpu")


def _record(step: int, tps: float = 100.0) -> dict[str, float]:
    return {"step": step, "loss": 4.0 / step, "tps": tps, "memory_peak_gib": 0.5}


def test_a_record_has_the_tags_that_users_know() -> None:
    assert scalars_of(RECORD, "cuda") == {
        "loss_metrics/global_avg_loss": 2.5,
        "grad_norm": 0.75,
        "lr": 0.125,
        "n_tokens_seen": 4096,
        "time_metrics/end_to_end(s)": 0.5,
        "time_metrics/data_loading(s)": 0.125,
        "time_metrics/data_loading(%)": 25.0,
        "throughput(tps)": 1024.0,
        "tflops": 3.5,
        "mfu(%)": 25.0,
        "mfu_float8(%)": 12.5,
        "memory/max_reserved(GiB)": 1.5,
        "moe/entropy": 0.875,
        "moe/dropped": 3,
    }


def test_what_is_not_known_has_no_curve_and_what_is_new_keeps_its_key() -> None:
    assert scalars_of({"step": 1, "mfu": None, "loss": "nan", "new": 1.5}, "cpu") == {"new": 1.5}
    assert set(scalars_of({"memory_peak_gib": 1.0}, "cpu")) == {"memory/max_resident(GiB)"}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tb", first_step=1)
    board.scalars(1, {"loss": 2.5, "lr": 0.125})
    board.scalars(2, {"loss": 1.25})
    board.close()
    assert scalars(tmp_path / "tb") == {"loss": [(1, 2.5), (2, 1.25)], "lr": [(1, 0.125)]}


def test_readers_drop_what_a_resumed_run_does_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The readers take files in the order of the seconds in their names.
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    for first_step, last_step, loss in ((1, 6, 4.0), (4, 8, 2.0)):
        board = TensorBoard(tmp_path, first_step, _about())
        for step in range(first_step, last_step + 1):
            board.scalars(step, {"loss": loss})
        board.close()
        now[0] += 100.0
    assert scalars(tmp_path)["loss"] == [(1, 4.0), (2, 4.0), (3, 4.0), *((step, 2.0) for step in range(4, 9))]
    assert [event.step for event in read(tmp_path).Tensors("config")] == [1, 4]


def test_a_file_begins_its_session_at_the_first_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=41)
    board.scalars(41, {"loss": 0.5})
    board.close()
    (file,) = tmp_path.iterdir()
    events = list(event_file_loader.RawEventFileLoader(str(file)).Load())
    assert len(events) >= 2
    sessions = [event for event in event_file_loader.EventFileLoader(str(file)).Load() if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in sessions] == [(41, 1)]


def test_a_board_without_scalars_is_closed_in_peace(tmp_path: Path) -> None:
    TensorBoard(tmp_path, first_step=1).close("finished")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_failed_is_raised_at_the_close(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    board = TensorBoard(blocked / "tb", first_step=1)
    board.scalars(1, {"loss": 1.0})
    with pytest.raises(OSError, match="file"):
        board.close()


def test_a_write_that_failed_is_raised_though_later_ones_did_not(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=1)
    board.scalars(1, {"loss": "high"})  # type: ignore[dict-item]
    board.scalars(2, {"loss": 1.0})
    with pytest.raises(TypeError):
        board.close()


def test_the_table_has_medians_of_a_run_that_finished_or_stopped(tmp_path: Path) -> None:
    for ended in ("finished", "stopped"):
        board = TensorBoard(tmp_path / ended, 1, _about())
        for step, tps in enumerate((1.0, 90.0, 100.0, 500.0), start=1):  # the first has the start in it
            board.metrics(_record(step, tps))
        board.close(ended)  # type: ignore[arg-type]
        assert scalars(tmp_path / ended)["throughput(tps)/median"] == [(4, 100.0)]
    board = TensorBoard(tmp_path / "goes on", 1, _about())
    board.metrics(_record(1))
    board.close()
    assert "throughput(tps)/median" not in scalars(tmp_path / "goes on")


def test_a_log_draws_its_records_and_events_while_a_board_is_open(tmp_path: Path) -> None:
    log = RunLog(tmp_path, writes=True)
    log.metrics(_record(1))
    log.board = board = TensorBoard(tmp_path / "tb", 2)
    log.metrics(_record(2))
    log.event("validation", 2, loss=3.5)
    log.event("checkpoint", 2, path="x", seconds=1.0)
    log.event("profile", 2, trace="x")
    log.board = None
    board.close()
    log.event("validation", 3, loss=3.0)
    found = scalars(tmp_path / "tb")
    assert found["loss_metrics/global_avg_loss"] == [(2, 2.0)]
    assert found["validation_metrics/loss"] == [(2, 3.5)]
    assert not {tag for tag in found if "profile" in tag or "seconds" in tag}


BREAKDOWN = {"compute_s": 0.5, "communication_exposed_s": 0.25, "copies_s": 0.0, "idle_s": 0.25}


def test_a_profile_is_a_bar_and_a_curve_a_part(tmp_path: Path) -> None:
    log = RunLog(tmp_path, writes=True)
    log.board = board = TensorBoard(tmp_path / "tb", 1)
    log.event("profile", 10, step_breakdown=BREAKDOWN, trace="x")
    log.event("profile", 20, step_breakdown=dict.fromkeys(BREAKDOWN, 0.0))  # nothing to draw
    board.close()
    found = read(tmp_path / "tb")
    assert {tag: values[0] for tag, values in scalars(tmp_path / "tb").items()} == {
        f"profile/{part}": (10, seconds) for part, seconds in BREAKDOWN.items()
    }
    (image,) = found.Tensors("profile/step_breakdown")
    assert image.step == 10
    width, height, png = image.tensor_proto.string_val
    pixels = _pixels(png)
    assert (int(width), int(height)) == (len(pixels[0]), len(pixels))
    for row in pixels:
        assert row == [COLOURS["blue"]] * 320 + [COLOURS["orange"]] * 160 + [COLOURS["grey"]] * 160


def test_parts_of_a_bar_fill_it_to_the_pixel() -> None:
    for parts in ([1.0], [1 / 3] * 3, [1e-9, 1.0], [0.1] * 7):
        (row, *_) = _pixels(stacked_bar(parts)[0])
        assert len(row) == 640
    for wrong in ([0.0, 0.0], [1.0, -0.5], [float("nan"), 1.0], [float("inf")]):
        with pytest.raises(ValueError, match="parts of a bar"):
            stacked_bar(wrong)


def _pixels(png: bytes) -> list[list[tuple[int, ...]]]:
    """Rows of (red, green, blue), by another reader where there is one."""
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + data),)
        chunks[kind], at = data, at + 12 + size
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    raw, stride = zlib.decompress(chunks[b"IDAT"]), 3 * width + 1
    assert len(raw) == stride * height
    rows = [raw[row * stride + 1 : (row + 1) * stride] for row in range(height)]
    assert all(raw[row * stride] == 0 for row in range(height))
    return [[tuple(row[3 * x : 3 * x + 3]) for x in range(width)] for row in rows]


@pytest.fixture(scope="module", params=["true", "false"])
def outputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Two runs and one of a comparison under one folder, one of them resumed with another rate, served."""
    logdir = tmp_path_factory.mktemp("outputs")
    runs = {"first": 0.5, "second": 0.25, "runs/a-1234/repeat-0": 0.125}
    for name, lr in runs.items():
        board = TensorBoard(logdir / name / "tb", 1, _about(lr, model=name))
        for step in (1, 2, 3):
            board.metrics(_record(step))
        board.event("validation", 3, {"loss": 1.5})
        board.add_profile(2, BREAKDOWN)
        board.close("finished")
    board = TensorBoard(logdir / "second" / "tb", 3, _about(0.75, model="second"))
    board.metrics(_record(3))
    board.close("stopped")
    with served(logdir, request.param) as up:
        deadline = time.monotonic() + 30
        while len(up.get("runs")) < len(runs) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield up  # type: ignore[misc]


def test_runs_stand_side_by_side_under_their_names(outputs: Served) -> None:
    assert set(outputs.get("runs")) == {"first/tb", "second/tb", "runs/a-1234/repeat-0/tb"}
    tags = outputs.get("plugin/scalars/tags")
    assert {"loss_metrics/global_avg_loss", "validation_metrics/loss", "throughput(tps)/median"} <= set(
        tags["first/tb"]
    )
    points = outputs.get("plugin/scalars/scalars", run="second/tb", tag="loss_metrics/global_avg_loss")
    assert [(step, value) for _, step, value in points] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3))]


def test_the_config_is_shown_as_code(outputs: Served) -> None:
    assert outputs.get("plugin/text/tags")["first/tb"] == ["config"]
    (text, *_) = outputs.get("plugin/text/text", run="first/tb", tag="config")
    assert "<pre><code" in text["text"]
    assert "lr = 0.5" in text["text"]


def test_the_table_of_recipes_has_a_row_a_run(outputs: Served) -> None:
    experiment = outputs.get("plugin/hparams/experiment", {"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"model", "optimizer.lr", "compile"}
    query = {
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [
            {"hparam": "optimizer.lr", "includeInResult": True},
            *({"metric": info["name"], "includeInResult": True} for info in experiment["metricInfos"]),
        ],
    }
    groups = outputs.get("plugin/hparams/session_groups", query)["sessionGroups"]
    rows = {group["sessions"][0]["name"]: group for group in groups}
    # Of a resumed run the settings are those of its last start.
    assert {name: row["hparams"]["optimizer.lr"] for name, row in rows.items()} == {
        "first/tb": 0.5,
        "second/tb": 0.75,
        "runs/a-1234/repeat-0/tb": 0.125,
    }
    values = {value["name"]["tag"]: value["value"] for value in rows["first/tb"]["metricValues"]}
    assert values["loss_metrics/global_avg_loss"] == pytest.approx(4 / 3)
    assert values["validation_metrics/loss"] == 1.5
    assert values["throughput(tps)/median"] == 100.0
    assert values["memory/max_resident(GiB)"] == 0.5
    assert {name: row["sessions"][0]["status"] for name, row in rows.items()} == {
        "first/tb": "STATUS_SUCCESS",
        "second/tb": "STATUS_UNKNOWN",
        "runs/a-1234/repeat-0/tb": "STATUS_SUCCESS",
    }


def test_the_picture_of_a_profile_is_served(outputs: Served) -> None:
    tags = outputs.get("plugin/images/tags")["first/tb"]
    assert "orange" in tags["profile/step_breakdown"]["description"]


def test_no_histogram_without_asking(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, 1, _about())
    board.metrics(_record(1))
    board.close()
    assert histograms(tmp_path) == {}
