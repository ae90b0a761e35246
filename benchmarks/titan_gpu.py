"""Configs for TorchTitan 0.3.0 with the shape of benchmarks/gpu.py: `--module titan_gpu --config bfloat16 | float8`.

Imported by TorchTitan's interpreter, which needs nothing of ours. Its own choices stay: attention, loss in parts, CUDA
graphs. Compiled, no checkpointing. TITAN_LAYERS, TITAN_SEQ_LEN, TITAN_STEPS and TITAN_LOG_FREQ give the shape; text is
read from the files of TITAN_CORPUS, and what is made of it goes to TITAN_FOLDER.
"""

import json
import os
from pathlib import Path

import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

# 0.3.0 calls it after the first step; torch 2.13 has it under its private name only.
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout

FOLDER, CORPUS = Path(os.environ["TITAN_FOLDER"]), Path(os.environ["TITAN_CORPUS"])
SHAPE = ("LAYERS", "SEQ_LEN", "STEPS", "LOG_FREQ")
LAYERS, SEQ_LEN, STEPS, LOG_FREQ = (int(os.environ[f"TITAN_{key}"]) for key in SHAPE)
BOS, EOS = "<s>", "</s>"


def bfloat16() -> Trainer.Config:
    return _config([])


def float8() -> Trainer.Config:
    return _config([Float8LinearConverter.Config(filter_fqns=["lm_head"], model_compile_enabled=True)])


def _config(converters: list) -> Trainer.Config:
    spec = model_registry("8B", converters=converters)
    del spec.model.layers[LAYERS:]
    texts = [path.read_text() for path in sorted(CORPUS.iterdir())]
    return Trainer.Config(
        model_spec=spec,
        hf_assets_path=str(_tokenizer(texts)),
        dump_folder=str(FOLDER),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)),
        optimizer=default_adamw(lr=1e-4),
        training=TrainingConfig(local_batch_size=1, seq_len=SEQ_LEN, steps=STEPS),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=str(_data(texts))),
        metrics=MetricsProcessor.Config(log_freq=LOG_FREQ, disable_color_printing=True),
        checkpoint=CheckpointManager.Config(enable=False),
        activation_checkpoint=None,
        compile=CompileConfig(enable=True),
    )


def _tokenizer(texts: list[str]) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=[BOS, EOS]))
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    (FOLDER / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return FOLDER


def _data(texts: list[str]) -> Path:
    folder = FOLDER / "data"
    folder.mkdir()
    # One document: between several its attention would be masked, and do less than ours.
    (folder / "data.json").write_text(json.dumps({"text": "\n".join(texts)}) + "\n")
    return folder
