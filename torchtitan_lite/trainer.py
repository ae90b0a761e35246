"""The training loop: what happens in a step, and between steps."""

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.assembly import Recipe, assemble
from torchtitan_lite.checkpoint.manager import CheckpointManager, Progress
from torchtitan_lite.data.loader import Batch, SampleStore, TrainLoader, validation_batches
from torchtitan_lite.data.prepare import Prepared
from torchtitan_lite.distributed import runtime
from torchtitan_lite.distributed.mesh import axis, build_mesh
from torchtitan_lite.observability.hardware import peak_tflops
from torchtitan_lite.observability.memory import peak_memory_gib
from torchtitan_lite.observability.metrics import StepClock, console_line
from torchtitan_lite.observability.sinks import RunLog, TensorBoard
from torchtitan_lite.optim.gradients import clip_by_global_norm
from torchtitan_lite.optim.optimizer import build_optimizer
from torchtitan_lite.preflight import JobPlan, identity

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
    Components: model, optimizer, loader, held_out, checkpoints, clock, log, stages (the ranks of its pipeline).
    State: progress.
    """

    def __init__(self, plan: JobPlan, prepared: Prepared, here: runtime.Runtime, log: RunLog) -> None:
        config = plan.config
        self.plan, self.config, self.here, self.log = plan, config, here, log
        recipe = Recipe(config, plan.dims, plan.spec, plan.model_args, plan.parallel, plan.pipeline)
        mesh = build_mesh(plan.dims, here.device.type)
        self.model = assemble(recipe, mesh, here.device, here.rank)
        stages, seq_len = axis(mesh, "pp"), config.training.seq_len
        self.stages = None if stages is None else stages.get_group()
        self.optimizer = build_optimizer(config.optimizer, self.model.named_parameters())
        self.batch_rank = plan.dims.batch_rank(here.rank)
        masked = config.data.document_mask
        train_store = SampleStore(prepared, prepared.train, seq_len, document_mask=masked)
        held_out_store = SampleStore(prepared, prepared.validation, seq_len, document_mask=masked)
        self.loader = TrainLoader(train_store, plan.batch, self.batch_rank, config.debug.seed)
        self.held_out = held_out_store if config.validation.enable else None
        self.checkpoints = CheckpointManager(
            plan.checkpoint_folder,
            config.checkpoint.keep_latest_k,
            self.model,
            self.optimizer,
            identity(plan, prepared),
        )
        # The table's peaks are bfloat16's.
        peak = peak_tflops(here.device_name) if config.training.mixed_precision_param == "bfloat16" else None
        flops_per_token = sum(plan.model_args.flops_by_module(seq_len).values())
        self.clock = StepClock(flops_per_token, plan.tokens_per_step, here.world_size, peak)
        self.progress = Progress()

    def train(self) -> None:
        """Run to training.steps, from the latest checkpoint where there is one."""
        self._resume()
        config, last = self.config, self.config.training.steps
        tensorboard = self._open_tensorboard()
        # Collecting whenever the interpreter likes would stall ranks at different times.
        gc.disable()
        self.clock.restart()
        first = self.progress.step + 1
        for step in range(first, last + 1):
            result = self.step(self._next_batches(step))
            if step in (first, last) or step % config.metrics.log_freq == 0:
                self._report(result, tensorboard)
            if step == first:
                runtime.tighten_timeouts(config.comm.train_timeout_seconds)
            if step % config.training.gc_freq == 0:
                gc.collect(1)
            if self.held_out is not None and (step == last or step % config.validation.freq == 0):
                self._validate(self.held_out, tensorboard)
            if config.checkpoint.enable and (step == last or step % config.checkpoint.interval == 0):
                self._save()
        self.log.event("end", self.progress.step)
        if tensorboard is not None:
            tensorboard.close()

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on this rank's micro-batches of a global batch."""
        rate = self.plan.schedule.lr(self.progress.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model.forward_backward(batches)
        grad_norm = clip_by_global_norm(self.model.parameters(), self.config.training.max_norm, self.stages)
        self.optimizer.step()
        self.optimizer.zero_grad()
        routed = None if self.model.balance is None else self.model.balance.step()
        seen = self.progress.tokens_seen + self.plan.tokens_per_step
        self.progress = Progress(self.progress.step + 1, self.loader.position, seen)
        return StepResult(loss, grad_norm, rate, routed)

    def _next_batches(self, step: int) -> list[Batch]:
        if self.config.metrics.log_sample_ids and self.log.writes:
            self.log.samples(step, self.loader.sample_ids())
        started = time.perf_counter()
        batches = self.loader.next_step()
        self.clock.took_data(time.perf_counter() - started)
        return batches

    def _report(self, result: StepResult, tensorboard: TensorBoard | None) -> None:
        """Sum the loss over ranks and log it with rates and memory; collective."""
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
        logger.info(console_line(record, self.config.training.steps))
        if tensorboard is not None:
            scalars = {key: value for key, value in record.items() if key != "step" and type(value) in (int, float)}
            tensorboard.write(self.progress.step, scalars)

    def _validate(self, store: SampleStore, tensorboard: TensorBoard | None) -> None:
        """Loss on the held-out part; training's position stays where it is. Collective."""
        section, per_step = self.config.validation, self.config.training.global_batch_size
        samples = store.samples if section.steps == -1 else section.steps * per_step
        with self.clock.paused():
            # A pipeline's micro-batches have one size.
            size = self.plan.batch.microbatch_size if self.plan.pipeline else section.local_batch_size
            batches = validation_batches(store, samples, size, self.batch_rank, self.plan.dims.batch_ranks)
            loss = self.model.evaluate(batches).item()
        self.log.event("validation", self.progress.step, loss=loss)
        logger.info("validation loss %.4f", loss)
        if tensorboard is not None:
            tensorboard.write(self.progress.step, {"validation_loss": loss})

    def _save(self) -> None:
        with self.clock.paused():
            started = time.perf_counter()
            folder = self.checkpoints.save(self.progress)
            seconds = time.perf_counter() - started
        self.log.event("checkpoint", self.progress.step, path=str(folder), seconds=seconds)
        logger.info("checkpoint %s in %.2f s", folder, seconds)

    def _resume(self) -> None:
        latest = self.checkpoints.latest() if self.config.checkpoint.enable else None
        self.log.event("start", latest or 0, world_size=self.here.world_size, mesh=str(self.plan.dims))
        if latest is None:
            if self.log.attempt > 1:
                logger.info("no checkpoint in %s: from the start again, earlier lines are superseded", self.plan.folder)
            return
        self.progress, saved_ranks = self.checkpoints.load(latest)
        self.loader.position = self.progress.position
        self.log.event("resume", latest, checkpoint=str(self.checkpoints.folder_of(latest)))
        if saved_ranks != self.here.world_size:
            self.log.event("world-size change", latest, before=saved_ranks, now=self.here.world_size)
        logger.info("resumed from step %d, %s", latest, self.checkpoints.folder_of(latest))

    def _open_tensorboard(self) -> TensorBoard | None:
        section = self.config.metrics
        if self.here.rank != 0 or not section.enable_tensorboard:
            return None
        return TensorBoard(self.plan.folder / section.save_tb_folder, self.progress.step + 1)
