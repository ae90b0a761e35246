"""Times of a step from traces made by hand, with known answers in milliseconds."""

from typing import Any

import pytest

from torchtitan_lite.profiling.breakdown import KINDS, STEP, Interval, step_breakdown, union, within, without

MAIN, WORKER, GPU_STREAM, NCCL_STREAM = 10, 11, 7, 20


def _event(cat: str, name: str, begin_ms: float, end_ms: float, thread: int = MAIN) -> dict[str, Any]:
    times = {"ts": 1000 * begin_ms, "dur": 1000 * (end_ms - begin_ms)}
    return {"ph": "X", "cat": cat, "name": name, "tid": thread, **times}


def _step(number: int, begin_ms: float, end_ms: float) -> dict[str, Any]:
    return _event("user_annotation", f"{STEP}{number}", begin_ms, end_ms)


def _op(name: str, begin_ms: float, end_ms: float, thread: int = MAIN) -> dict[str, Any]:
    return _event("cpu_op", name, begin_ms, end_ms, thread)


def _gloo(begin_ms: float, end_ms: float, thread: int = WORKER) -> dict[str, Any]:
    return _event("user_annotation", "gloo:all_gather", begin_ms, end_ms, thread)


def _kernel(name: str, begin_ms: float, end_ms: float, stream: int = GPU_STREAM) -> dict[str, Any]:
    return _event("kernel", name, begin_ms, end_ms, stream)


def _copy(name: str, begin_ms: float, end_ms: float) -> dict[str, Any]:
    return _event("gpu_memcpy", name, begin_ms, end_ms, 9)


# Of a step from 100 to 200 ms: the events, and ms of compute, exposed communication, copies, idle.
CASES: dict[str, tuple[list[dict[str, Any]], tuple[float, float, float, float]]] = {
    "nothing runs": ([], (0, 0, 0, 100)),
    "operations beside each other and within each other count once": (
        [_op("aten::linear", 110, 150), _op("aten::addmm", 111, 149), _op("aten::mul", 140, 160, 12)],
        (50, 0, 0, 50),
    ),
    "a collective that is half hidden": ([_op("aten::mm", 100, 130), _gloo(120, 140)], (30, 10, 0, 60)),
    "what a thread of collectives copies is of them": (
        [_gloo(110, 120), _op("aten::copy_", 112, 118, WORKER), _op("aten::div_", 121, 125, WORKER)],
        (0, 14, 0, 86),
    ),
    "a node of autograd waits and does not compute": (
        [
            _op("ReluBackward0", 110, 150),
            _op("autograd::engine::evaluate_function: ReluBackward0", 109, 151),
            _op("torch::autograd::AccumulateGrad", 105, 106),
            _op("aten::threshold_backward", 145, 148),
            _gloo(112, 140),
        ],
        (3, 28, 0, 69),
    ),
    "a product waits in the collective that it holds": (
        [_op("tests::matmul_and_sum", 110, 150), _op("c10d::allreduce_", 120, 130)],
        (30, 10, 0, 60),
    ),
    "compiled code computes but for its collectives": (
        [_op("Torch-Compiled Region: 0/0", 110, 150), _op("_c10d_functional::wait_tensor", 120, 125)],
        (35, 5, 0, 60),
    ),
    "what began before the step or ends after it": (
        [_op("aten::mm", 90, 110), _gloo(195, 230), _op("aten::mm", 210, 220)],
        (10, 5, 0, 85),
    ),
    "kernels by name, with the host out of it": (
        [
            _op("aten::mm", 100, 200),
            _gloo(100, 200),
            _kernel("sm90_xmma_gemm_bf16", 110, 140),
            _kernel("ampere_fp16_s16816gemm", 130, 150, 8),
            _kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 145, 170, NCCL_STREAM),
        ],
        (40, 20, 0, 40),
    ),
    "copies by their ends": (
        [
            _copy("Memcpy HtoD (Pinned -> Device)", 100, 110),
            _copy("Memcpy DtoH (Device -> Pinned)", 115, 120),
            _copy("Memcpy DtoD (Device -> Device)", 120, 130),
            _copy("Memcpy PtoP (Device -> Device)", 130, 134),
            _event("gpu_memset", "Memset (Device)", 140, 141, 9),
        ],
        (11, 4, 15, 70),
    ),
    "a copy behind communication behind a kernel": (
        [_kernel("gemm", 100, 110), _kernel("ncclKernel_AllReduce", 105, 120), _copy("Memcpy HtoD", 100, 125)],
        (10, 10, 5, 75),
    ),
    "symmetric memory sends": ([_kernel("multimem_all_reduce_kernel<bf16>", 110, 120)], (0, 10, 0, 90)),
    "marks of the device and the trace's own span are none": (
        [
            _event("gpu_user_annotation", f"{STEP}1", 100, 200, GPU_STREAM),
            _event("Trace", "PyTorch Profiler (0)", 0, 300),
            {"ph": "i", "name": "Record Window End", "ts": 1.0},
        ],
        (0, 0, 0, 100),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_instant_of_a_step_is_of_one_kind(case: str) -> None:
    events, expected = CASES[case]
    found = step_breakdown([_step(1, 100, 200), *events])
    assert tuple(found) == KINDS
    assert list(found.values()) == pytest.approx([ms / 1000 for ms in expected], abs=1e-9)
    assert sum(found.values()) == pytest.approx(0.1)


def test_of_several_steps_the_mean_and_nothing_between_them() -> None:
    events = [_step(3, 0, 100), _step(4, 300, 320), _op("aten::mm", 50, 310), _gloo(200, 400)]
    found = step_breakdown(events)
    assert list(found.values()) == pytest.approx([0.030, 0.005, 0.0, 0.025])


def test_a_trace_without_a_marked_step_says_so() -> None:
    with pytest.raises(ValueError, match="no step is marked"):
        step_breakdown([_op("aten::mm", 0, 1)])


def test_intervals() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    cut: list[tuple[list[Interval], list[Interval], list[Interval]]] = [
        ([(0, 10)], [(2, 3), (5, 7)], [(0, 2), (3, 5), (7, 10)]),
        ([(0, 4), (6, 10)], [(3, 7)], [(0, 3), (7, 10)]),
        ([(2, 4)], [(0, 1), (1.5, 9)], []),
        ([(0, 1), (2, 3)], [], [(0, 1), (2, 3)]),
        ([(0, 5), (8, 9)], [(5, 8)], [(0, 5), (8, 9)]),
    ]
    for intervals, others, left in cut:
        assert without(intervals, others) == left
    assert within([(0, 4), (6, 10)], (3, 8)) == 3
