"""What went to which expert, on a mesh and on one process: compared before all else, and exactly.

A choice between scores closer than TIE may fall either way by rounding. Such a flip is a tie: it is counted, and what
comes after it in the run is not compared, for there the two are different runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchtitan_lite.models.common.routing import EXTRAS, Routing

TIE = 1e-6


@dataclass(frozen=True)
class Routed:
    """choices: by layer, int64 [steps, samples, positions, top_k], of each token in ascending order. gaps: by layer,
    [steps, samples, positions], between the last score that was chosen and the first that was not. counted: of each
    step, as Balance.step returns it. biases: after the last step, by name."""

    choices: dict[str, Tensor] = field(default_factory=dict)
    gaps: dict[str, Tensor] = field(default_factory=dict)
    counted: list[Tensor] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoutedDifference:
    """steps: up to the first tie. choices: other experts chosen without a tie. balance: largest relative difference of
    counts, balance losses and biases, of which all but the losses must be equal to the bit."""

    steps: int
    ties: int
    choices: int
    balance: float


class Watch:
    """Keeps what a rank's mixtures choose in training."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.counted = trainer, []
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._steps: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for part in trainer.model.parts:
            for name, module in part.named_modules():
                if isinstance(module, Routing):
                    self._calls[name], self._steps[name], self._routing = [], [], module
                    module.register_forward_hook(lambda _, args, out, name=name: self._keep(name, args, out))

    def _keep(self, name: str, args: Any, out: Any) -> None:
        logits, bias, weights = args
        computed_again = torch._C._current_graph_task_id() != -1  # by a backward
        if weights is None or computed_again:
            return
        scores = (logits.detach().softmax(-1) + bias).topk(out[0].shape[-1] + 1).values
        self._calls[name].append((out[0].sort(-1).values, scores[..., -2] - scores[..., -1]))

    def step(self, result: Any) -> None:
        """After each step."""
        for name, calls in self._calls.items():
            choices, gaps = zip(*calls, strict=True)
            # The rest fill up the last micro-batches.
            own = slice(len(self.trainer.plan.batch.share(self.trainer.batch_rank)))
            self._steps[name].append((torch.cat(choices)[own], torch.cat(gaps)[own]))
            calls.clear()
        if result.routed is not None:
            self.counted.append(result.routed)

    def parts(self) -> tuple[list[tuple[str, list[int], Tensor, Tensor, Tensor]], list[Tensor], dict[str, Tensor]]:
        """(layer, samples of the global batch, their positions on this rank, choices, gaps), counts, biases."""
        trainer, found = self.trainer, []
        share = list(trainer.plan.batch.share(trainer.batch_rank))
        for name, steps in self._steps.items():
            sharers = self._routing.sharers
            positions = torch.arange(trainer.config.training.seq_len)
            if sharers is not None:
                positions = sharers.own_L
            choices, gaps = zip(*steps, strict=True)
            found.append((name, share, positions, torch.stack(choices), torch.stack(gaps)))
        state = trainer.model.state_dict()
        return found, self.counted, {name: value.clone() for name, value in state.items() if "expert_bias" in name}


def whole(ranks: Iterable[tuple[Any, Any, Any]], samples: int, seq_len: int) -> Routed:
    """What all ranks saw, put together."""
    choices: dict[str, Tensor] = {}
    gaps: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    counts: list[Tensor] = []
    for found, counted, own in ranks:
        assert not counts or all(torch.equal(a, b) for a, b in zip(counts, counted, strict=True)), (
            "routing: ranks have other counts"
        )
        counts = counted
        for name, value in own.items():
            assert torch.equal(biases.setdefault(name, value), value), f"routing: ranks disagree on {name}"
        for name, share, positions, chosen, gap in found:
            if name not in choices:
                choices[name] = torch.full((len(chosen), samples, seq_len, chosen.shape[-1]), -1)
                gaps[name] = torch.zeros((len(chosen), samples, seq_len))
            at = torch.tensor(share, dtype=torch.int64)[:, None], positions
            choices[name][(slice(None), *at)] = chosen
            gaps[name][(slice(None), *at)] = gap
    assert all(bool((each >= 0).all()) for each in choices.values()), "routing: tokens that no rank has routed"
    order = sorted(choices, key=lambda name: int(name.split(".")[1]))
    return Routed({name: choices[name] for name in order}, gaps, counts, biases)


def compare_routed(found: Routed, expected: Routed) -> RoutedDifference:
    assert list(found.choices) == list(expected.choices)
    steps = max((len(each) for each in expected.choices.values()), default=1 << 30)
    for step in range(steps if expected.choices else 0):
        # What flips in one layer changes the ones behind it.
        for name, choices in expected.choices.items():
            moved = (found.choices[name][step] != choices[step]).any(-1)
            if count := int(moved.sum()):
                tied = bool((expected.gaps[name][step][moved] <= TIE).all())
                return RoutedDifference(
                    step, count if tied else 0, 0 if tied else count, _balance(found, expected, step)
                )
    balance = _balance(found, expected, steps)
    exact = all(torch.equal(found.biases[name], bias) for name, bias in expected.biases.items())
    return RoutedDifference(steps, 0, 0, balance if exact else float("inf"))


def _balance(found: Routed, expected: Routed, steps: int) -> float:
    worst = [torch.zeros(())]
    for ours, theirs in zip(found.counted[:steps], expected.counted[:steps], strict=True):
        whole_numbers = slice(0, -EXTRAS + 1)  # counts and what was dropped
        if not torch.equal(ours[:, whole_numbers], theirs[:, whole_numbers]):
            return float("inf")
        losses, reference = ours[:, -EXTRAS + 1 :], theirs[:, -EXTRAS + 1 :]
        # Tensors' max: Python's passes over NaNs. A loss without a weight is 0 on both.
        worst.append(((losses - reference).abs() / reference.abs().clamp(min=1e-30)).max())
    return float(torch.stack([each.double() for each in worst]).max())
