"""The training loop: what happens in a step, and between steps."""

import gc
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from torchtitan_lite import model_table
from torchtitan_lite.assembly import Recipe, assemble
from torchtitan_lite.checkpoint.cadence import Cadence
from torchtitan_lite.checkpoint.manager import CheckpointManager, Loaded, Progress
from torchtitan_lite.config.resolution import uses_float8
from torchtitan_lite.data.loader import Batch, SampleStore, TrainLoader, validation_batches
from torchtitan_lite.data.passed_over import read_passed_over
from torchtitan_lite.data.prepare import Prepared
from torchtitan_lite.distributed import runtime
from torchtitan_lite.distributed.compile import compiled_so_far
from torchtitan_lite.distributed.mesh import axis, build_mesh
from torchtitan_lite.distributed.runtime import settle
from torchtitan_lite.distributed.sent import sent_since
from torchtitan_lite.elastic.agreement import Agreed, agree
from torchtitan_lite.elastic.faults import Guard, Skipped, pass_over, step_unless, why_stop
from torchtitan_lite.elastic.preemption import AGENTS_NOTICE_S, RESTART, StopSignals, may_restart
from torchtitan_lite.elastic.replay import run_twice
from torchtitan_lite.elastic.watchdog import Watchdog
from torchtitan_lite.errors import Corruption, UserError
from torchtitan_lite.observability.histograms import Histograms
from torchtitan_lite.observability.logging import at_step
from torchtitan_lite.observability.memory import peak_memory_by_rank, peak_memory_gib
from torchtitan_lite.observability.metrics import console_line
from torchtitan_lite.observability.sinks import RunLog
from torchtitan_lite.optim.gradients import clip_by_global_norm
from torchtitan_lite.optim.optimizer import build_optimizer, set_lr
from torchtitan_lite.preflight import JobPlan, identity
from torchtitan_lite.profiling.profiler import Profiler
from torchtitan_lite.rates import step_clock
from torchtitan_lite.run_board import open_board
from torchtitan_lite.run_record import clear_stopped, manifest_record, write_stopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Device tensors, read only where a step is logged.

    loss: this rank's part, float32 scalar; the parts of all ranks sum to the loss. grad_norm: global, before
    clipping, float64 scalar. lr: the rate of the step. routed: what went to which expert (see Balance.step), None for a
    dense model.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float
    routed: Tensor | None


class Trainer:
    """One run on one rank.

    Configuration: plan, config, here (this process among the others).
    Components: model, optimizer, histograms (None without), guard (None where no step is skipped), loader, held_out,
    checkpoints, cadence, signals, clock, log, watchdog, profiler, stages (the ranks of its pipeline).
    State: progress, saved (the step of the newest checkpoint).
    """

    def __init__(
        self, plan: JobPlan, prepared: Prepared, here: runtime.Runtime, log: RunLog, watchdog: Watchdog
    ) -> None:
        config = plan.config
        self.plan, self.config, self.here, self.log, self.watchdog = plan, config, here, log, watchdog
        recipe = Recipe(config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
        mesh = build_mesh(plan.dims, here.device.type)
        self.model = assemble(recipe, mesh, here.device, here.rank)
        if logger.isEnabledFor(logging.INFO):
            self._tell_plan()
        watchdog.watch(self.model.parts)
        stages, seq_len = axis(mesh, "pp"), config.training.seq_len
        self.stages = None if stages is None else stages.get_group()
        self.optimizer = build_optimizer(config.optimizer, self.model.named_parameters(), plan.parallel.experts)
        self.histograms = None
        if config.metrics.histogram_freq:
            self.histograms = Histograms(self.model.named_parameters(), self.stages, here.device)
        self.guard = Guard(config.faults, here.device) if config.faults.skip_nonfinite else None
        self.batch_rank = plan.dims.batch_rank(here.rank)
        masked = config.data.document_mask
        train_store = SampleStore(prepared, "train", seq_len, document_mask=masked)
        held_out_store = SampleStore(prepared, "validation", seq_len, document_mask=masked)
        # The first rank's: another node may not see yet what was written just before a restart.
        ranges = runtime.from_first_rank(read_passed_over(plan.folder) if here.rank == 0 else None)
        self.loader = TrainLoader(train_store, plan.batch, self.batch_rank, config.debug.seed, ranges)
        self.held_out = held_out_store if config.validation.enable else None
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            plan.checkpoint_folder,
            self.model,
            self.optimizer,
            manifest_record(plan, identity(plan, prepared)),
            plan.dims.first_peer(here.rank),
            log.event,
            {} if self.guard is None else self.guard.tensors,
        )
        self.cadence = Cadence(config.checkpoint.interval, config.checkpoint.interval_minutes)
        self.signals = StopSignals(config.elastic.grace_seconds)
        self.clock = step_clock(plan, here.device_name, partial(settle, here.device))
        profiled = (config.profiling, plan.folder, config.training.steps)
        self.profiler = Profiler(*profiled, here, log, watchdog, self.clock)
        self.progress, self.saved = Progress(), 0
        float8 = config.quantize.linear.float8
        self.scales_ahead = uses_float8(config) and float8.precompute_float8_dynamic_scale_for_fsdp
        self._parameters_changed()  # they have their first values

    def train(self) -> int:
        """Run to training.steps, from the latest checkpoint where there is one.

        Returns the number of the signal that ended it before, at a step that is saved; 0 where none did.
        """
        with self.watchdog.paused("loading a checkpoint"):
            self._resume()
        config, last = self.config, self.config.training.steps
        self.log.board = open_board(self.plan, self.here, self.progress.step + 1)
        # Collecting whenever the interpreter likes would stall ranks at different times.
        gc.disable()
        self.clock.restart()
        first, stop = self.progress.step + 1, 0
        self.signals.hold(signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        while (step := self.progress.step + 1) <= last:
            at_step(step, last)
            self.watchdog.begin(step)
            self.profiler.begin(step)
            began_ns = time.time_ns()
            result = self.step(self._next_batches(step))
            if step == first:
                # Until here a Ctrl-C ends the rank at once: there is nothing to save yet, and much to compile.
                self.signals.hold(signal.SIGINT)
            agreed = self._agree()
            if logged := step in (first, last) or bool(agreed.stop) or step % config.metrics.log_freq == 0:
                self._report(result)
            if step == first + 1:
                self._tell_traffic(began_ns)
            self.profiler.ended(step, stopping=agreed.stop > 0)
            if step == first:
                if config.compile.enable:
                    self._tell_compiled()
                seconds = config.comm.train_timeout_seconds + runtime.AFTER_THE_WATCHDOG_S
                runtime.tighten_timeouts(seconds, (self.checkpoints.group, self.profiler.group))
                self.watchdog.tighten()
            if step % config.training.gc_freq == 0:
                gc.collect(1)
            if row := self._too_many_skipped(newest_too=step == last or agreed.stop > 0):
                first = self._roll_back(row)
                continue
            if self.held_out is not None and (step == last or step % config.validation.freq == 0) and not agreed.stop:
                agreed = self._validate(self.held_out, agreed)
            if stop := self._save_where_due(agreed):
                if not logged:  # told to stop since
                    self._report(result)
                break
        self._end(stop)
        self._close_board("stopped" if stop else "finished")
        return stop

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch."""
        rate = self.plan.schedule.lr(self.progress.step + 1)
        set_lr(self.optimizer, rate)
        self.watchdog.beat("forward and backward")
        loss = self._forward_backward(batches)
        self._count_values()
        self.watchdog.beat("clipping gradients")
        grad_norm = clip_by_global_norm(self.model.parameters(), self.config.training.max_norm, self.stages)
        self.watchdog.beat("optimizer step")
        skip = None
        if self.guard is not None:
            skip = self.guard.judge(loss, grad_norm, self.progress.step + 1, self.loader.taken)
        step_unless(skip, self.optimizer)
        self.optimizer.zero_grad()
        self._parameters_changed()
        routed = None if self.model.balance is None else self.model.balance.step(skip)
        seen = self.progress.tokens_seen + self.plan.tokens_per_step
        self.progress = Progress(self.progress.step + 1, self.loader.position, seen)
        return StepResult(loss, grad_norm, rate, routed)

    def _forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        step, run = self.progress.step + 1, partial(self.model.forward_backward, batches)
        if step not in self.config.debug.replay_steps:
            return run()
        return run_twice(self.model, run, self.here.device, step, self.log.event)

    def _count_values(self) -> None:
        """Where it is time to, histograms of parameters and gradients as the backward leaves them. Collective."""
        step = self.progress.step + 1
        if self.histograms is None or step % self.config.metrics.histogram_freq:
            return
        self.watchdog.beat("histograms")
        with self.clock.paused():
            counted = self.histograms.count()
            if self.log.board is not None:
                self.log.board.histograms(step, counted.on_host())

    def _tell_plan(self) -> None:
        plan, at = self.plan, self.plan.dims.coordinate(self.here.rank)
        stages, of = (
            ([], 0) if plan.pipeline is None else (plan.pipeline.stages_of(at["pp"]), len(plan.pipeline.stages))
        )
        section = self.config.activation_checkpoint
        logger.info(model_table.told(self.model.parts, plan.parallel, section, stages, of))

    def _tell_traffic(self, began_ns: int) -> None:
        """Record what the first rank sent in a step that is like those to come."""
        whole = self.stages is None or self.here.device.type == "cuda"  # gloo does not record what stages send
        if self.log.writes and whole and (sent := sent_since(began_ns)):
            self.log.event("traffic", self.progress.step, **sent)

    def _tell_compiled(self) -> None:
        told = compiled_so_far()
        self.log.event("compiled", self.progress.step, **told)
        logger.info("compiled %(graphs)d graphs in %(seconds).1f s, pieces reused: %(reused)d, made: %(made)d", told)

    def _parameters_changed(self) -> None:
        if self.scales_ahead:
            from torchtitan_lite.quantization.float8 import precompute_scales

            precompute_scales(self.model.parts)

    def _next_batches(self, step: int) -> list[Batch]:
        if self.config.metrics.log_sample_ids and self.log.writes:
            self.log.samples(step, self.loader.sample_ids())
        started = time.perf_counter()
        batches = self.loader.next_step()
        self.clock.took_data(time.perf_counter() - started)
        return batches

    def _report(self, result: StepResult) -> None:
        """Sum the loss over ranks and log it with rates and memory; collective."""
        self.watchdog.beat("logging")
        loss = result.loss.double()
        dist.all_reduce(loss)
        memory = loss.new_tensor(peak_memory_gib(self.here.device))
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        record = {
            "step": self.progress.step,
            "loss": loss.item(),
            "grad_norm": result.grad_norm.item(),
            "lr": result.lr,
            "tokens_seen": self.progress.tokens_seen,
            **self.clock.record(),
            "memory_peak_gib": memory.item(),
        }
        if result.routed is not None:
            from torchtitan_lite.balance import routing_record

            record |= routing_record(result.routed, self.config.moe)
        self.log.metrics(record)
        logger.info(console_line(record))

    def _validate(self, store: SampleStore, agreed: Agreed) -> Agreed:
        """Loss on the held-out part; training's position stays where it is. Collective.

        Returns what ranks have agreed upon last: told to stop, they leave it unfinished.
        """
        section, per_step = self.config.validation, self.config.training.global_batch_size
        samples = store.samples if section.steps == -1 else section.steps * per_step

        def until_told_to_stop(batches: Iterable[Batch]) -> Iterator[Batch]:
            nonlocal agreed
            for batch in batches:
                agreed = self._agree()
                if agreed.stop:
                    return
                self.watchdog.beat("validation")
                yield batch

        with self.clock.paused():
            # A pipeline's micro-batches have one size.
            size = self.plan.batch.microbatch_size if self.plan.pipeline else section.local_batch_size
            self.watchdog.beat("validation")
            batches = validation_batches(store, samples, size, self.batch_rank, self.plan.dims.batch_ranks)
            loss = self.model.evaluate(until_told_to_stop(batches)).item()
        if agreed.stop:
            logger.info("the validation of step %d is left out, to stop in time", self.progress.step)
            return agreed
        self.log.event("validation", self.progress.step, loss=loss)
        logger.info("validation loss %.4f", loss)
        return agreed

    def _agree(self) -> Agreed:
        saver = self.checkpoints.saver
        self.watchdog.beat("agreeing")
        return agree(self.signals.received, saver.written or not saver.in_flight, self.cadence.by_clock())

    def _save_where_due(self, agreed: Agreed) -> int:
        """Save where it is time to, and take note of the save in flight. Collective; returns the signal to stop at."""
        section, step, saver = self.config.checkpoint, self.progress.step, self.checkpoints.saver
        if not section.enable:
            return agreed.stop
        done = step == self.config.training.steps and agreed.stop != signal.SIGABRT  # of faults: to be gone on from
        ends = done or bool(agreed.stop)
        due = ends or agreed.due or self.cadence.due(step)
        with self.clock.paused(settled=due), self.watchdog.paused("saving a checkpoint"):
            if saver.in_flight and (due or agreed.written):
                self._take_note()
            for attempt in range(3 if ends else 1):
                if not due or self.saved == step:
                    break
                time.sleep(attempt)  # before another attempt, where there will be no next step
                self.cadence.began()
                self.checkpoints.save(self.progress, model_only=done and section.last_save_model_only)
                if ends or section.async_mode == "disabled":
                    self._take_note()
            if ends and self.saved != step:
                raise UserError(
                    f"the checkpoint of step {step} could not be written, the last one is of step {self.saved}; make "
                    "room or mend the folder, and start again"
                )
            # A signal that came during the save finds its step saved.
            return agreed.stop or (self._agree().stop if self.saved == step else 0)

    def _too_many_skipped(self, *, newest_too: bool) -> Skipped | None:
        """Record the steps that were skipped, newest_too or up to the one before; return the last one of a row that is
        longer than faults.max_in_a_row."""
        skipped = [] if self.guard is None else self.guard.read(all_of_them=newest_too)
        for each in skipped:
            self.log.event("skipped step", each.step, **each.record(), ids=self.loader.sample_ids(each.begin))
            logger.warning("skipped step %d: %s", each.step, each)
        return next((each for each in skipped[::-1] if each.in_a_row > self.config.faults.max_in_a_row), None)

    def _roll_back(self, row: Skipped) -> int:
        """Go back to the latest checkpoint and pass over the samples of `row`. Collective; returns 0, which is no step.

        Raises UserError where it is to stop instead (see why_stop); the last good state is then saved.
        """
        assert self.guard is not None
        with self.clock.paused(), self.watchdog.paused("rolling back"):
            row = self._too_many_skipped(newest_too=True) or row
            if self.checkpoints.saver.in_flight:
                self._take_note()
            self.guard.forget_row()
            if stop := why_stop(row, self.config.faults, self.loader.passed_over, self.saved):
                self.log.event("stopped by faults", self.progress.step, why=stop)
                self._save_where_due(Agreed(stop=signal.SIGABRT, written=False, due=False))
                raise UserError(stop)
            # First: a run that is killed from here on passes over them too.
            self.loader.passed_over = pass_over(self.plan.folder, self.loader.passed_over, row)
            before, details = self.checkpoints.resume(), {"from_step": self.progress.step, "passed_over": row.positions}
            assert before is not None
            self.guard.forget_row()
            self.progress, self.saved = before.progress, before.progress.step
            self.loader.position = self.progress.position
        self._went_on_from(before, "roll back", "rolled back to", **details)
        self._close_board(None)  # another, for readers to drop the curves of what was taken back
        self.log.board = open_board(self.plan, self.here, self.progress.step + 1)
        return 0

    def _take_note(self) -> None:
        """Wait for the save in flight, say how it went, and try again soon where it failed."""
        outcome = self.checkpoints.saver.outcome()
        times = {"seconds": outcome.seconds, "stalled_s": outcome.stalled}
        if outcome.error is None:
            self.saved = outcome.step
            self.cadence.succeeded()
            self.log.event("checkpoint", outcome.step, path=str(outcome.folder), **times)
            logger.info("checkpoint %s in %.2f s, training waited %.2f s", outcome.folder, *times.values())
            return
        retry = self.cadence.failed(self.progress.step)
        self.log.event("checkpoint failed", outcome.step, error=outcome.error, **times)
        logger.error(
            "the checkpoint of step %d could not be written: %s; trying again after step %d",
            outcome.step,
            outcome.error,
            retry,
        )

    def _end(self, stop: int) -> None:
        self._too_many_skipped(newest_too=True)
        if not stop:
            self.log.event("end", self.progress.step, memory_peak_gib=peak_memory_by_rank(self.here.device))
            return
        name, step = signal.Signals(stop).name, self.progress.step
        saved = self.saved if self.config.checkpoint.enable else None
        self.log.event("preemption", step, signal=name, saved=saved)
        if self.log.writes:
            write_stopped(self.plan.folder, step=step, signal=name, saved=saved)

    def exit_code(self, stop: int) -> int:
        """0; on a rank that only follows others that were told to stop, what makes torchrun start it again.

        To be called when no other rank waits for this one any more, and signals have their usual effect.
        """
        if not stop or self.signals.received or not may_restart():
            return 0
        # Its agent may be about to stop it too, for a node that joins, which costs no restart.
        time.sleep(AGENTS_NOTICE_S)
        return RESTART

    def _resume(self) -> None:
        section, before, again = self.config.checkpoint, None, runtime.is_restart()
        ended = self.log.of_attempt_before("stopped by faults", "silent corruption")
        # torchrun starts whatever fails: what was to stop would go on behind the fault.
        if again and (ended := runtime.from_first_rank(ended)) is not None:
            raise (UserError if ended["event"] == "stopped by faults" else Corruption)(ended["why"])
        latest = self.checkpoints.latest() if section.enable else None
        at = {"world_size": self.here.world_size, "mesh": str(self.plan.dims), "host": os.uname().nodename}
        self.log.event("start", latest or 0, **at)
        if self.log.writes:
            clear_stopped(self.plan.folder)
        if section.enable:
            # What torchrun starts again goes on from where it was, not from the step that the user chose once.
            before = self.checkpoints.resume(-1 if again else section.load_step)
        if before is not None:
            self.progress, self.saved = before.progress, before.progress.step
            self._went_on_from(before, "resume", "resumed from")
        elif section.initial_load_path:
            first = self.checkpoints.load_initial(section.initial_load_path)
            if not section.initial_load_model_only:
                excluded = section.exclude_from_loading
                anew = {"dataloader": {"position": 0}, "train_state": {"step": 0, "tokens_seen": 0}}
                changes = [entry for part, entry in anew.items() if part in excluded]
                self.progress = replace(first.progress, **{k: v for entry in changes for k, v in entry.items()})
            if self.progress.step >= (last := self.config.training.steps):
                raise UserError(
                    f"checkpoint.initial_load_path: {first.folder} is at step {self.progress.step}, and training.steps "
                    f'is {last}; raise it, or begin at step 0 with checkpoint.exclude_from_loading = ["train_state"]'
                )
            self._went_on_from(first, "initial load", "starting from the tensors of")
        elif self.log.attempt > 1:
            logger.info("no checkpoint in %s: from the start again, earlier lines are superseded", self.plan.folder)
        self.loader.position = self.progress.position

    def _went_on_from(self, loaded: Loaded, event: str, how: str, **details: Any) -> None:
        self._parameters_changed()
        step = loaded.progress.step
        self.log.event(event, step, checkpoint=str(loaded.folder), **details)
        if loaded.world_size != self.here.world_size:
            self.log.event("world-size change", step, before=loaded.world_size, now=self.here.world_size)
        batch = self.config.training.global_batch_size
        if loaded.global_batch_size != batch:
            logger.warning(
                "training.global_batch_size is %d and was %d: the order of samples is kept, steps take others; set it "
                "in the recipe, -1 makes it follow the number of ranks",
                batch,
                loaded.global_batch_size,
            )
        logger.info("%s step %d, %s", how, step, loaded.folder)

    def close(self) -> None:
        """Wait for a save in flight: it is whole or it is none, whatever ended the run."""
        self.signals.release()
        self.profiler.close()
        with self.watchdog.paused("waiting for the save in flight"):
            self.checkpoints.saver.close()

    def _close_board(self, ended: Literal["finished", "stopped"] | None) -> None:
        board, self.log.board = self.log.board, None
        if board is not None:
            board.close(ended)
