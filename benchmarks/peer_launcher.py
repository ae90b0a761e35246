"""TorchTitan 0.3.0 or 0.2.2 on CPU, as benchmarks/peer.py runs it: by torchrun, in an interpreter that has it and
needs nothing of ours.

Its trainer and its defaults stay but for the shape, plain causal attention, float32, and what does not run on a CPU
under torch 2.13 (see `_mend`). Each rank writes the ends of its steps, its peak of resident memory and its number of
parameters to FOLDER/rank-N.json; rank 0 prints a line after the first step.

    torchrun ... peer_launcher.py FOLDER '{"mesh": "fsdp", "checkpointing": "none", "compile": false, ...}'
    python peer_launcher.py --prepare FOLDER     # a text and a tokenizer that all runs share
"""

import json
import os
import resource
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

BOS, EOS = "<s>", "</s>"


def prepare(folder: Path) -> None:
    """`tokenizer.json` of the debug model's vocabulary, and a document for each of two ranks: between several 0.3.0
    restarts positions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "corpus").iterdir())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=[BOS, EOS]))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "data.json").write_text((json.dumps({"text": "\n".join(texts)}) + "\n") * 2)


def _mend() -> None:
    """What both versions take for granted and a CPU, gloo or torch 2.13 does not have; before they are imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stubs = {
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: SimpleNamespace(name="CPU", total_memory=memory),
        "memory_stats": lambda *_: Counter(),
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }
    for name, stub in stubs.items():
        setattr(torch.cpu, name, stub)
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout
    barrier = dist.barrier
    dist.barrier = lambda *args, device_ids=None, **kwargs: barrier(*args, **kwargs)


def newer(folder: Path, run: dict) -> tuple[type, object]:
    """0.3.0: its trainer and a config for it."""
    import torchtitan.models.llama3 as llama3
    from torchtitan.models.common import attention, config_utils

    config_utils.get_attention_config = llama3.get_attention_config = lambda backend: (
        attention.ScaledDotProductAttention.Config()
    )
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed.activation_checkpoint import SelectiveAC
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.trainer import Trainer

    spec = llama3.model_registry("debugmodel")
    mesh = {"data_parallel_replicate_degree": run["ranks"], "data_parallel_shard_degree": 1}
    config = Trainer.Config(
        model_spec=spec,
        hf_assets_path=str(run["assets"]),
        dump_folder=str(folder),
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        optimizer=default_adamw(lr=8e-4),
        training=TrainingConfig(
            local_batch_size=run["local_batch"],
            global_batch_size=run["batch"],
            seq_len=run["seq_len"],
            steps=run["steps"],
            mixed_precision_param="float32",
        ),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **(mesh if run["mesh"] == "ddp" else {})),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=str(run["assets"] / "data")),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(enable=False),
        activation_checkpoint=SelectiveAC.Config() if run["checkpointing"] == "op" else None,
        compile=CompileConfig(enable=run["compile"]),
    )
    return Trainer, config


def older(folder: Path, run: dict) -> tuple[type, object]:
    """0.2.2: the same."""
    from torchtitan.config import ConfigManager
    from torchtitan.train import Trainer

    settings = {
        "model.name": "llama3",
        "model.flavor": "debugmodel",
        "model.hf_assets_path": run["assets"],
        "job.dump_folder": folder,
        "training.local_batch_size": run["local_batch"],
        "training.global_batch_size": run["batch"],
        "training.seq_len": run["seq_len"],
        "training.steps": run["steps"],
        "training.dataset": "c4_test",
        "training.dataset_path": run["assets"] / "data",
        "training.mixed_precision_param": "float32",
        "metrics.log_freq": 1,
        "activation_checkpoint.mode": "none" if run["checkpointing"] == "none" else "selective",
        "activation_checkpoint.selective_ac_option": "op",
    }
    if run["mesh"] == "ddp":
        settings |= {
            "parallelism.data_parallel_replicate_degree": run["ranks"],
            "parallelism.data_parallel_shard_degree": 1,
        }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return Trainer, ConfigManager().parse_args([*flags, *(["--compile.enable"] if run["compile"] else [])])


def main() -> None:
    if sys.argv[1] == "--prepare":
        prepare(Path(sys.argv[2]))
        return
    folder, run = Path(sys.argv[1]), json.loads(sys.argv[2])
    run["assets"] = Path(run["assets"])
    _mend()
    from torchtitan.tools.logging import init_logger

    init_logger()
    trainer_class, config = (older if version("torchtitan").startswith("0.2") else newer)(folder, run)
    ends: list[float] = []
    step = trainer_class.train_step

    def timed(*args: object) -> object:
        result = step(*args)
        ends.append(time.perf_counter())
        if len(ends) == 1 and dist.get_rank() == 0:
            print("first step done", flush=True)
        return result

    trainer_class.train_step = timed
    trainer = config.build() if hasattr(config, "build") else trainer_class(config)
    for part in trainer.model_parts:
        for module in part.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):  # gloo has no PREMUL_SUM
                module.set_force_sum_reduction_for_comms(True)
    parameters = sum(parameter.numel() for part in trainer.model_parts for parameter in part.parameters())
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"ends": ends, "peak_kib": peak, "parameters": parameters}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
