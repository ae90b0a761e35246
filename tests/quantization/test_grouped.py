"""Float8 of experts' products: by hand, padded, which experts, what is refused, how far the numbers move."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.test_moe import _gradients, _moe, _nothing_in_the_tail, _x
from tests.ranks import RankPool
from tests.test_trainer import _run
from tests.tiny import MOE, write_recipe
from torchtitan_lite.config.techniques import GroupedFloat8
from torchtitan_lite.errors import UserError
from torchtitan_lite.models.common.moe import Experts, GroupedSwiGLU
from torchtitan_lite.models.common.routing import Rules
from torchtitan_lite.quantization.grouped import (
    EmulatedSwiGLU,
    ScaledSwiGLU,
    _rounded_along,
    _rounded_in_groups,
    apply_grouped_float8,
    padded_places,
    require_named_experts,
)

CPU = torch.device("cpu")
EXPERTS = ["experts"]
D, F_ = 32, 48
# Sizes of groups and rows past the last; one group without any, one of one row, one of several kernels' blocks.
SIZES, TAIL = [5, 0, 1, 40, 17], 6
E, R = len(SIZES), sum(SIZES) + TAIL


def _ends(sizes: list[int] = SIZES) -> Tensor:
    return torch.tensor(sizes).cumsum(0, dtype=torch.int32)


def _inputs(tail: int = TAIL, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows, w1, w2, w3 as experts hand them on; of columns and rows of unlike sizes, so that each scale is another."""
    draw = torch.Generator().manual_seed(0)

    def uneven(*shape: int) -> Tensor:
        sizes = torch.randn(shape[:-1], generator=draw)[..., None] + torch.randn(shape[-1], generator=draw)
        return torch.randn(shape, generator=draw) * (3 * sizes).exp2()

    tensors = [uneven(sum(SIZES) + tail, D), *(uneven(E, *shape) / 64 for shape in ((F_, D), (D, F_), (F_, D)))]
    return [each.to(dtype).requires_grad_() for each in tensors]


def _computed(swiglu: Any, inputs: list[Tensor], ends: Tensor) -> list[Tensor]:
    """The output of the rows that are some expert's, and all gradients."""
    rows, *weights = inputs
    own = torch.arange(len(rows))[:, None] < ends[-1]
    out = swiglu(rows.where(own, 0.0), *(each.transpose(-2, -1) for each in weights), ends).where(own, 0.0)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


def _rounded(x: Tensor, dim: int) -> Tensor:
    """To 4 bits of what is a power of two above the least that holds the largest number along `dim`, in float64."""
    assert x.dtype == torch.float64
    out = torch.zeros_like(x).movedim(dim, -1)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:-1])).reshape(-1, out.dim() - 1):
        vector = x.movedim(dim, -1)[tuple(index)]
        scale = 2.0 ** math.floor(math.log2(448.0 / max(float(vector.abs().max()), 1e-12)))
        exponent = (vector * scale).abs().clamp(min=2.0**-6).log2().floor()
        step = 2.0 ** (exponent - 3)  # three bits behind the first; below 2^-6 as far apart as there
        out[tuple(index)] = (vector * scale / step).round() * step / scale
    return out.movedim(-1, dim)


class _ByHand(torch.autograd.Function):
    """x [n, K] times w [N, K] transposed, each of three products from factors rounded along what it sums over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _rounded(x, 1) @ _rounded(w, 1).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return _rounded(grad, 1) @ _rounded(w, 0), _rounded(grad, 0).t() @ _rounded(x, 0)


def _loop(rows: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, ends: Tensor) -> Tensor:
    """Expert after expert."""
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        x = rows[start:end]
        if end > start:
            gate, up = (_ByHand.apply(x, w[expert].t()) for w in (w1, w3))
            x = _ByHand.apply(F.silu(gate) * up, w2[expert].t())
        parts.append(x)
        start = end
    return torch.cat([*parts, torch.zeros_like(rows[start:])])


def _error(found: Tensor, expected: Tensor) -> float:
    """The worst vector's, relative to its own length."""
    lengths = expected.norm(dim=-1)
    return float(((found.double() - expected).norm(dim=-1) / lengths)[lengths > 1e-20].max())


def test_products_are_those_of_experts_one_by_one_rounded_by_hand() -> None:
    inputs = [each.detach().double().requires_grad_() for each in _inputs()]
    expected = _computed(_loop, inputs, _ends())
    plain, found = (_computed(swiglu, _inputs(), _ends()) for swiglu in (GroupedSwiGLU(), EmulatedSwiGLU()))
    for name, near, exact, by_hand in zip(("out", "rows", "w1", "w2", "w3"), found, plain, expected, strict=True):
        assert _error(exact, by_hand) > 0.3, name  # the rounding shows
        assert _error(near, by_hand) < 1e-5, name


def test_scales_and_rounding_are_torchaos() -> None:
    from torchao.prototype.moe_training.utils import (
        torch_to_3d_rowwise_float8_transpose_rhs,
        torch_to_float8_per_group_colwise,
        torch_to_float8_per_group_rowwise,
    )

    rows, w1, _, _ = (each.detach() for each in _inputs(tail=0))
    found, kinds = torch.float8_e4m3fn, {"round_scales_to_power_of_2": True}
    sizes = [size for size in SIZES if size]  # theirs takes no other
    numbers, scales = torch_to_float8_per_group_colwise(rows, _ends(sizes), found, **kinds)
    theirs = numbers.float() / scales.view(-1, D).repeat_interleave(torch.tensor(sizes), 0)
    assert torch.equal(_rounded_in_groups(rows, _ends()), theirs)
    numbers, scales = torch_to_float8_per_group_rowwise(rows, torch.tensor([D]), found, **kinds)
    assert torch.equal(_rounded_along(rows, -1), numbers.float() / scales[:, None])
    numbers, scales = torch_to_3d_rowwise_float8_transpose_rhs(w1.transpose(-2, -1), found, **kinds)
    assert torch.equal(_rounded_along(w1, -2), numbers.float() / scales)


def test_what_is_rounded_has_room_in_bfloat16() -> None:
    rows = _inputs(dtype=torch.bfloat16)[0].detach()
    for dim in (-1, -2):
        assert torch.equal(_rounded_along(rows, dim).float(), _rounded_along(rows.float(), dim))


def test_vectors_of_zeros_stay_so_and_what_is_no_number_is_seen() -> None:
    assert not _rounded_along(torch.zeros(2, 3), -1).any()
    for bad in (float("nan"), float("inf")):
        rounded = _rounded_along(torch.tensor([[1.0, bad], [1.0, 2.0]]), -1)
        assert rounded.isfinite().tolist() == [[False, False], [True, True]]


def _checked(rows: Tensor, weights: Tensor, ends: Tensor, **settings: Any) -> Tensor:
    """In the place of torchao's products: takes what those take, and leaves the tail as they do."""
    assert settings == {"out_dtype": rows.dtype, "pad_token_groups_for_grouped_mm": False}
    assert (ends.dtype, weights.stride(-2), rows.stride(-1)) == (torch.int32, 1, 1)
    assert len(rows) % 16 == 0
    assert int(ends[-1]) <= len(rows)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    assert not (sizes % 16).any()
    assert (sizes > 0).all()
    return EmulatedSwiGLU().product(rows, weights, ends)


@pytest.mark.parametrize("tail", [0, TAIL])
def test_padding_changes_nothing(tail: int) -> None:
    expected = _computed(EmulatedSwiGLU(), _inputs(tail), _ends())
    with _nothing_in_the_tail():
        found = _computed(ScaledSwiGLU(_checked), _inputs(tail), _ends())
    for padded, plain in zip(found, expected, strict=True):
        assert _error(padded, plain.double()) < 1e-5


def _scaled_grouped_mm(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, ends: Tensor, **settings: Any
) -> Tensor:
    """torch's, which is there on CUDA alone: its checks of shapes and strides, and its product from rounded numbers."""
    metas = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b, a_scales, b_scales)]
    shape = torch._scaled_grouped_mm(*metas, ends.to("meta"), **settings).shape
    if b.dim() == 3:
        a_scales, b_scales = a_scales[:, None], b_scales[:, None]
    else:  # a scale for each row and group
        sizes = torch.cat((ends, ends.new_tensor([len(b)]))).diff(prepend=ends.new_zeros(1))
        a_scales, b_scales = (
            F.pad(scales.view(len(ends), -1), (0, 0, 0, 1)).repeat_interleave(sizes, 0)
            for scales in (a_scales, b_scales)
        )
        a_scales = a_scales.t()
    out = F.grouped_mm(*(x.to(settings["out_dtype"]) for x in (a.float() * a_scales, b.float() * b_scales)), offs=ends)
    assert out.shape == shape
    return out


def _torchao(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchao's grouped products with its own references in the place of kernels that need CUDA."""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
    from torchao.prototype.moe_training import fp8_grouped_mm, utils

    def along(dim: int) -> Any:
        def cast(x: Tensor, output_dtype: torch.dtype, round_scales_to_power_of_2: bool) -> tuple[Tensor, Tensor]:
            scale = tensor_to_scale(
                x,
                output_dtype,
                scaling_granularity=ScalingGranularity.AXISWISE,
                axiswise_dim=dim,
                round_scales_to_power_of_2=round_scales_to_power_of_2,
            )
            return to_fp8_saturated(x.float() * scale, output_dtype), scale

        return cast

    def transposed(x: Tensor, output_dtype: torch.dtype, **kinds: bool) -> tuple[Tensor, Tensor]:
        return utils.torch_to_3d_rowwise_float8_transpose_rhs(x, output_dtype, **kinds)

    def dual(a: Tensor, b: Tensor, *settings: Any, **kinds: bool) -> tuple[Tensor, ...]:
        return tuple(
            made.t().contiguous().t() if made.dim() == 2 else made  # in columns
            for each in (a, b)
            for made in utils.torch_to_float8_per_group_colwise(each.t().contiguous().t(), *settings, **kinds)
        )

    for name, stand_in in (
        ("rowwise_2d_scale_and_cast", along(-1)),
        ("colwise_3d_scale_and_cast", along(-2)),
        ("rowwise_3d_transpose_rhs", transposed),
        ("per_group_colwise_scales_dual", dual),
    ):
        monkeypatch.setattr(fp8_grouped_mm, f"triton_fp8_{name}", stand_in)
    torch_there = SimpleNamespace(**{**vars(torch), "_scaled_grouped_mm": _scaled_grouped_mm})
    monkeypatch.setattr(fp8_grouped_mm, "torch", torch_there)
    return fp8_grouped_mm._to_fp8_rowwise_then_scaled_grouped_mm


@pytest.mark.parametrize("tail", [0, TAIL])
def test_emulation_is_torchaos_products(tail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    swiglu = ScaledSwiGLU(_torchao(monkeypatch))
    with _nothing_in_the_tail():
        found = _computed(swiglu, _inputs(tail, torch.bfloat16), _ends())
    expected = _computed(EmulatedSwiGLU(), _inputs(tail, torch.bfloat16), _ends())
    for theirs, ours in zip(found, expected, strict=True):
        assert (theirs - ours).norm() < 1e-3 * ours.norm()


@pytest.mark.parametrize(
    "sizes", [[0, 0, 0], [16, 32, 16], [1, 1, 1], [17, 0, 15], [15, 16, 17], [47]], ids=lambda sizes: str(sizes)
)
@pytest.mark.parametrize("tail", [0, 1, 15, 16, 40])
def test_every_row_has_a_place_of_its_own_in_its_group(sizes: list[int], tail: int) -> None:
    rows = sum(sizes) + tail
    places, ends, length = padded_places(rows, _ends(sizes))
    assert length % 16 == 0
    assert rows <= length <= rows + 16 * len(sizes) + 15
    assert ends.diff(prepend=ends.new_zeros(1)).tolist() == [max(16, -(-size // 16) * 16) for size in sizes]
    groups = torch.searchsorted(ends, places.int(), right=True).tolist()
    assert groups == [group for group, size in enumerate([*sizes, tail]) for _ in range(size)]
    assert len(set(places.tolist())) == rows
    assert not rows or int(places.max()) < length


def test_a_rank_without_rows_computes_none() -> None:
    inputs = [torch.zeros(0, D, requires_grad=True), *_inputs()[1:]]
    for swiglu in (EmulatedSwiGLU(), ScaledSwiGLU(_checked)):
        out, d_rows, *d_weights = _computed(swiglu, inputs, torch.zeros(E, dtype=torch.int32))
        assert out.shape == d_rows.shape == (0, D)
        assert not any(each.any() for each in d_weights)


@pytest.mark.parametrize("swiglu", [EmulatedSwiGLU(), ScaledSwiGLU(_checked)], ids=lambda each: type(each).__name__)
def test_nothing_of_the_tail_is_read(swiglu: nn.Module) -> None:
    moe, x = _moe(Rules(capacity_factor=1.2)), _x()
    moe.experts.swiglu = swiglu
    whole = _gradients(moe, x, moe(x))
    with _nothing_in_the_tail():
        found = _gradients(moe, x, moe(x))
    for name, grad in whole.items():
        assert torch.allclose(found[name], grad, rtol=1e-5, atol=1e-7), name


def _meta(flavor: str = "routed") -> nn.Module:
    with torch.device("meta"):
        return MOE.build(MOE.flavors[flavor])


def _kinds(model: nn.Module) -> list[str]:
    return [type(module.swiglu).__name__ for module in model.modules() if isinstance(module, Experts)]


def test_which_experts_compute_in_float8_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = _meta()
    with caplog.at_level(logging.INFO):
        apply_grouped_float8(model, GroupedFloat8(["layers.1.", "layers.3.feed_forward.experts"], emulate=True), CPU)
    assert _kinds(model) == ["GroupedSwiGLU", "EmulatedSwiGLU"] * 2
    (line,) = [record.getMessage() for record in caplog.records if record.name == "torchtitan_lite"]
    assert line == (
        "float8    rowwise, emulated, products of 2 layers of experts: layers.*.feed_forward.experts; not "
        "layers.0.feed_forward.experts, layers.2.feed_forward.experts: not in quantize.grouped_mm.float8.fqns"
    )


@pytest.mark.parametrize(
    ("model", "fqns", "reason"),
    [
        (_meta(), ["experts", "exprets"], r'"exprets" is in no name of experts; some are layers\.0\.feed_forward\.exp'),
        (_meta("shared"), ["shared"], '"shared" is in no name of experts'),
        (nn.Linear(2, 2), EXPERTS, '"experts" is in no name of experts; the model has none of models.common.moe'),
    ],
)
def test_names_that_cannot_be_meant_are_refused(model: nn.Module, fqns: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=rf"^quantize\.grouped_mm\.float8\.fqns: {reason}"):
        require_named_experts(model, GroupedFloat8(fqns))


def _on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "L40")
    return torch.device("cuda")


def test_hardware_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 9), (12, 0)):
        with pytest.raises(
            UserError, match=r"L40 has no grouped products .* 9\.0 or 10\.0.; set quantize\.grouped_mm\."
        ):
            apply_grouped_float8(_meta(), GroupedFloat8(EXPERTS), _on(monkeypatch, capability))
    with pytest.raises(UserError, match=r"no such products on CPU; set quantize\.grouped_mm\.float8\.emulate = true"):
        apply_grouped_float8(_meta(), GroupedFloat8(EXPERTS), CPU)


def test_another_torchao_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.prototype.moe_training import fp8_grouped_mm

    name = "_to_fp8_rowwise_then_scaled_grouped_mm"
    monkeypatch.setattr(fp8_grouped_mm, name, lambda a, b, offs, out_dtype=None: a)
    cuda = _on(monkeypatch, (9, 0))
    with pytest.raises(UserError, match=r"torchao \S+ does not have the prototype of torchao 0\.18"):
        apply_grouped_float8(_meta(), GroupedFloat8(EXPERTS), cuda)
    monkeypatch.delattr(fp8_grouped_mm, name)
    with pytest.raises(UserError, match=r"torchao \S+ does not have the prototype of torchao 0\.18"):
        apply_grouped_float8(_meta(), GroupedFloat8(EXPERTS), cuda)


def test_on_hopper_they_are_torchaos(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm as theirs

    model = _meta()
    apply_grouped_float8(model, GroupedFloat8(EXPERTS), _on(monkeypatch, (9, 0)))
    assert _kinds(model) == ["ScaledSwiGLU"] * 4
    assert {module.swiglu.scaled for module in model.modules() if isinstance(module, Experts)} == {theirs}


def test_shapes_that_float8_cannot_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = MOE.build(replace(MOE.flavors["routed"], ffn_dim=40))
    with pytest.raises(UserError, match=r"experts\.w1 is 40 x 64 for an expert, .* multiples of 16; leave it out of"):
        apply_grouped_float8(model, GroupedFloat8(EXPERTS), _on(monkeypatch, (9, 0)))
    apply_grouped_float8(model, GroupedFloat8(EXPERTS, emulate=True), CPU)


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path, cache: Path) -> Path:
    sections: dict[str, Any] = {
        "model": {"spec": "tests.tiny:MOE", "flavor": "routed", "converters": ["quantize.grouped_mm.float8"]},
        "quantize.grouped_mm.float8": {"fqns": EXPERTS, "emulate": True},
    }
    return write_recipe(tmp_path / "recipe.toml", corpus, cache, **sections)


@pytest.mark.ranks(2)
def test_both_converters_train_together_and_a_stage_without_experts_of_its_own_is_left_alone(
    pool: RankPool, recipe: Path, tmp_path: Path
) -> None:
    both = '--model.converters=["quantize.linear.float8", "quantize.grouped_mm.float8"]'
    filters = '--quantize.linear.float8.filter_fqns=["output"]'
    few = ("--training.steps=3", '--quantize.grouped_mm.float8.fqns=["layers.0."]')
    losses = {
        name: [line["loss"] for line in _run(pool, ranks, recipe, tmp_path / name, *few, *settings)]
        for name, ranks, settings in (
            ("plain", 1, ("--model.converters=[]",)),
            ("one", 1, ()),
            ("both", 1, (both, filters)),
            ("pp", 2, ("--parallelism.pipeline_parallel_degree=2",)),
        )
    }
    assert losses["pp"] == pytest.approx(losses["one"], rel=2e-4)
    assert losses["plain"] == pytest.approx(losses["one"], rel=0.02)
    assert len({losses[name][0] for name in ("plain", "one", "both")}) == 3
