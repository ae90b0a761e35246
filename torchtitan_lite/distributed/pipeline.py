"""Pipeline parallelism on torch.distributed.pipelining: the schedule over this rank's stages.

Imported where there is a pipeline: torch.distributed.pipelining takes 2 s to import.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
    get_schedule_class,
)

from torchtitan_lite.distributed.pipeline_plan import PipelinePlan
from torchtitan_lite.observability.phases import recording, span

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


def apply_pipeline_parallel(
    parts: Sequence[nn.Module],
    mesh: DeviceMesh,
    plan: PipelinePlan,
    *,
    device: torch.device,
    edges: Callable[[int], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Schedule:
    """The schedule over this rank's `parts` (one a stage, in order); `mesh` has the one axis of pipeline ranks.

    edges: stage to what goes in and comes out for one micro-batch, tensors on meta. loss: of what the last
    stage gives and labels, already divided by what divides the step's loss.
    """
    rank, count = mesh.get_local_rank(), len(plan.stages)
    stages = []
    for index, part in zip(plan.stages_of(rank), parts, strict=True):
        # Shapes are known: torch need not run the model to learn them.
        inputs, outputs = edges(index)
        stages.append(PipelineStage(part, index, count, device, inputs, outputs, group=mesh.get_group()))
    settings: dict[str, Any] = {"n_microbatches": plan.microbatches, "loss_fn": loss, "scale_grads": False}
    if plan.order:
        schedule = _PipelineScheduleRuntime(stages, **settings)
        # Takes the placement of the stages from the order too, in the place of torch's default.
        schedule.pipeline_order = {
            row: [_Action.from_str(text) for text in texts] for row, texts in enumerate(plan.order)
        }
        schedule._prepare_schedule_with_comms(schedule.pipeline_order)
        return schedule
    cls = get_schedule_class(plan.schedule)
    return cls(stages[0] if issubclass(cls, PipelineScheduleSingle) else stages, **settings)  # type: ignore[no-any-return]


# What a stage does for a micro-batch, and what the time of it is called.
_PIECES = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "backward",
    "backward_weight_one_chunk": "backward",
}


@contextmanager
def pieces_marked(schedule: Schedule) -> Iterator[None]:
    """Within it each stage's forwards and backwards are spans of the phase, where phases are recorded."""
    if not recording():
        yield
        return
    stages = [schedule._stage] if isinstance(schedule, PipelineScheduleSingle) else schedule._stages
    for stage in stages:
        for method, name in _PIECES.items():
            setattr(stage, method, _marked(getattr(stage, method), f"{name} of stage {stage.stage_index}"))
    try:
        yield
    finally:
        for stage in stages:
            for method in _PIECES:
                delattr(stage, method)


def _marked(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return call(*args, **kwargs)

    return marked


@contextmanager
def forward_only(schedule: Schedule) -> Iterator[None]:
    """Within it `schedule.eval` works for every schedule: torch's fails on V-shaped ones, whose backwards it skips too
    late, and frees parameters around backwards that do not happen."""
    if not isinstance(schedule, _PipelineScheduleRuntime):
        yield
        return
    order = schedule.pipeline_order_with_comms
    schedule.pipeline_order_with_comms = {rank: list(_forwards(actions)) for rank, actions in order.items()}
    try:
        yield
    finally:
        schedule.pipeline_order_with_comms = order


_FORWARD = (_ComputationType.FORWARD, _ComputationType.SEND_F, _ComputationType.RECV_F)


def _forwards(actions: Sequence[_Action]) -> Iterator[_Action]:
    """Forwards and what they exchange, in their order; each stage gathers its parameters first and frees them last."""
    kept = [each for action in actions for each in action.sub_actions or (action,) if each.computation_type in _FORWARD]
    stages = dict.fromkeys(action.stage_index for action in kept if action.computation_type == _ComputationType.FORWARD)
    yield from (_Action(stage, _ComputationType.UNSHARD) for stage in stages)
    yield from kept
    yield from (_Action(stage, _ComputationType.RESHARD) for stage in stages)
