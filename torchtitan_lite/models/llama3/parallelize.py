"""Llama 3's plan: where techniques attach, and the first values of its parameters. No torch."""

import math

from torchtitan_lite.models.llama3.args import Llama3Args
from torchtitan_lite.models.spec import Init, ParallelPlan


def plan(args: Llama3Args) -> ParallelPlan:
    """Embedding, each block, then norm and output together; a tied embedding stays with the whole model,
    which uses it first and last."""
    if args.tied:
        return ParallelPlan(fsdp_units=(("layers.*",),))
    return ParallelPlan(fsdp_units=(("tok_embeddings",), ("layers.*",), ("norm", "output")))


def initial(name: str, args: Llama3Args) -> Init:
    """TorchTitan's initialisation: normals of 0.02; wo, w2 and w3 scaled down by depth; an output matrix that
    starts with logits of unit variance."""
    parts = name.split(".")
    if "norm" in parts[-2]:
        return Init(mean=1.0)
    if parts[-2] == "tok_embeddings":
        return Init(std=args.dim**-0.5, cutoff=3.0) if args.tied else Init(std=1.0)
    if parts[-2] == "output":
        return Init(std=args.dim**-0.5, cutoff=3.0)
    if parts[-2] in ("wo", "w2", "w3"):
        layer = int(parts[1])
        return Init(std=0.02 / math.sqrt(2 * (layer + 1)))
    return Init(std=0.02)
