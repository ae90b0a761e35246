"""Every setting a recipe may hold, with its type, default, bounds and meaning.

Section and key names are TorchTitan 0.2.2's wherever the concept is the same. The text under a field is
its documentation: docs/configuration.md is made from it.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan_lite.config.optimizing import LRScheduler as LRScheduler
from torchtitan_lite.config.optimizing import Optimizer as Optimizer
from torchtitan_lite.config.running import Checkpoint as Checkpoint
from torchtitan_lite.config.running import Comm as Comm
from torchtitan_lite.config.running import Elastic as Elastic
from torchtitan_lite.config.running import Faults as Faults
from torchtitan_lite.config.setting import setting
from torchtitan_lite.config.techniques import ActivationCheckpoint as ActivationCheckpoint
from torchtitan_lite.config.techniques import Compile as Compile
from torchtitan_lite.config.techniques import Quantize as Quantize


@dataclass(frozen=True)
class Job:
    """The run as a whole."""

    dump_folder: str = ""
    """Folder of the run, where everything is written and from where it resumes. Empty: outputs/ and the
    recipe's name."""

    description: str = ""
    """A line for readers of logs and config.json."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = "llama3"
    """Model family, one of those registered."""

    flavor: str = "debugmodel"
    """Size within the family."""

    spec: str = ""
    """Import path `package.module:SPEC` of a ModelSpec from outside; takes the place of `name`."""

    converters: list[Literal["quantize.linear.float8", "quantize.grouped_mm.float8"]] = field(default_factory=list)
    """What the model is changed by before it is spread over ranks: names of sections."""

    tokenizer_path: str = ""
    """A sentencepiece .model file. Empty: one is trained on the corpus once and cached."""


@dataclass(frozen=True)
class Training:
    """Data, batch, length and precision of the run."""

    dataset: Literal["python_stdlib", "text", "mixture"] = "python_stdlib"
    """`python_stdlib`: the source files of the Python that runs this. `text`: every UTF-8 file under
    `dataset_path`, a document each. `mixture`: several of those, data.mixture_paths."""

    dataset_path: str = ""
    """A file or folder for dataset `text`."""

    local_batch_size: int = setting(8, minimum=1)
    """Samples of a data-parallel rank in one forward pass, at most. Under a pipeline it only stands behind
    global_batch_size = -1."""

    global_batch_size: int = setting(-1, minimum=1, auto=-1)
    """Samples of one step over all ranks. -1: local_batch_size x data-parallel ranks. More than the ranks
    hold at once is reached by gradient accumulation; a rank count that does not divide it is legal."""

    seq_len: int = setting(2048, minimum=1)
    """Tokens a sample is trained on; a sample holds one more, for the last label."""

    loss_chunks: int = setting(1, minimum=1)
    """Parts of a micro-batch's tokens whose logits exist at one time. 1: all logits at once. More: output matrix and
    loss are one, and neither logits nor their gradients are ever whole."""

    max_norm: float = setting(1.0, above=0.0, infinite=True)
    """Gradients are scaled down to this global L2 norm; inf leaves them as they are."""

    steps: int = setting(10_000, minimum=1)
    """Optimizer steps of the whole run, those before a resume included."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of parameters and activations in forward and backward; master weights stay float32."""

    mixed_precision_reduce: Literal["float32"] = "float32"
    """Type in which gradients are reduced over ranks."""

    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory, and step the optimizer there."""

    gc_freq: int = setting(50, minimum=1)
    """Steps between Python garbage collections; in between the collector is off, on all ranks alike."""


@dataclass(frozen=True)
class Parallelism:
    """Degrees of each mesh axis; their product is the world size."""

    data_parallel_replicate_degree: int = setting(1, minimum=1)
    """Copies of the model. With a shard degree of 1: DDP; with a larger one: HSDP."""

    data_parallel_shard_degree: int = setting(-1, minimum=1, auto=-1)
    """Ranks over which parameters are sharded (FSDP2). -1: all that the other degrees leave."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether a block's parameters are freed after its forward and gathered again for its backward. `default`:
    always, under a pipeline never. `never` also keeps whole gradients until the step's last micro-batch, so that
    accumulation reduces them once, as every pipeline does; `always` reduces shards in every micro-batch."""

    tensor_parallel_degree: int = setting(1, minimum=1)
    """Ranks that share each matrix product, and the sequence between them (sequence parallel)."""

    disable_loss_parallel: bool = False
    """Under tensor parallelism: gather the logits over the vocabulary instead of taking the loss on its parts."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallelism's collectives with its matrix products, piece by piece, through symmetric memory;
    needs CUDA and compile.enable."""

    context_parallel_degree: int = setting(1, minimum=1)
    """Ranks that share each sequence."""

    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """`allgather`: every rank gathers all keys and values, and attends from its own queries, two pieces of the
    sequence that cost as much on every rank. `alltoall`: ranks exchange sequence for heads (Ulysses,
    arXiv:2309.14509)."""

    pipeline_parallel_degree: int = setting(1, minimum=1)
    """Ranks that each hold some of the layers."""

    pipeline_parallel_schedule: Literal[
        "1F1B",
        "GPipe",
        "Interleaved1F1B",
        "LoopedBFS",
        "InterleavedZeroBubble",
        "ZBVZeroBubble",
        "DualPipeV",
        "PipelineScheduleSingle",
        "PipelineScheduleMulti",
    ] = "1F1B"
    """Order of forwards and backwards. The first two run one stage a rank, the others several; the last two take
    their order from `pipeline_parallel_schedule_csv`."""

    pipeline_parallel_schedule_csv: str = ""
    """A file with a line for each pipeline rank, of actions such as `0F3` (stage 0, forward, micro-batch 3), with B
    for a whole backward, I and W for its halves (inputs, weights)."""

    pipeline_parallel_microbatch_size: int = setting(1, minimum=1)
    """Samples of a micro-batch under a pipeline; takes the place of local_batch_size there."""

    pipeline_parallel_layers_per_stage: int = setting(-1, minimum=1, auto=-1)
    """Layers of each stage but the last, which takes what is left. -1: one or two stages a rank, as the schedule has
    them, cut so that the most costly is as cheap as can be, embedding and output weighed by their FLOPs."""

    module_fqns_per_model_part: list[list[str]] = field(default_factory=list)
    """The modules of each stage by name, as in `[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]`.
    Empty: as pipeline_parallel_layers_per_stage says."""

    expert_parallel_degree: int = setting(1, minimum=1)
    """Ranks that share the experts of a mixture; they are ranks of the data and context axes too, whose product this
    divides."""

    expert_parallel_comm_backend: Literal["standard"] = "standard"
    """How tokens travel to their experts; `standard`: all-to-all collectives of torch."""

    expert_tensor_parallel_degree: int = setting(1, minimum=1)
    """Ranks that share the matrix products of an expert; 1 only. Under tensor parallelism each rank routes its part of
    the sequence, and experts are spread over its ranks whole."""


@dataclass(frozen=True)
class MoE:
    """How tokens are spread over the experts of a mixture."""

    bias_update_rate: float = setting(1e-3, minimum=0.0)
    """After each step the bias with which an expert is chosen moves so much up where it had fewer tokens than the mean,
    down where it had more (arXiv:2408.15664). TorchTitan's load_balance_coeff. 0: not at all."""

    aux_loss_coeff: float = setting(0.0, minimum=0.0)
    """Weight of the balance loss (arXiv:2101.03961), taken over each sample, summed over layers; 1 where all experts
    have as much."""

    z_loss_coeff: float = setting(0.0, minimum=0.0)
    """Weight of the mean squared log-sum-exp of router logits (arXiv:2202.08906), summed over layers."""

    capacity_factor: float = setting(-1.0, above=0.0, auto=-1)
    """An expert takes at most so many times its even share of the tokens of a sample, the first ones; the rest pass it
    by. -1: no token is dropped."""

    overlap_halves: bool = False
    """Under expert parallelism: send a rank's tokens to their experts in two halves, of which one travels while the
    other computes."""


@dataclass(frozen=True)
class Validation:
    """Loss on the part of the corpus that is held out of training."""

    enable: bool = False
    """Validate every `freq` steps and after the last one."""

    local_batch_size: int = setting(8, minimum=1)
    """Samples of a rank in one forward pass; under a pipeline pipeline_parallel_microbatch_size counts."""

    freq: int = setting(10, minimum=1)
    """Training steps between validations."""

    steps: int = setting(-1, minimum=1, auto=-1)
    """Batches of training.global_batch_size samples per validation, the same on every mesh. -1: the whole held-out
    part; of a mixture, until its first source has no more."""


@dataclass(frozen=True)
class Metrics:
    """What is logged, and where."""

    log_freq: int = setting(10, minimum=1)
    """Steps between lines on the console, in metrics.jsonl and in TensorBoard."""

    enable_tensorboard: bool = True
    """Write TensorBoard events."""

    save_tb_folder: str = "tb"
    """TensorBoard folder inside the run folder."""

    histogram_freq: int = setting(0, minimum=0)
    """Steps between histograms of every parameter and its gradient in TensorBoard. 0: none."""

    disable_color_printing: bool = False
    """No colours in the log, on a terminal either. NO_COLOR in the environment does the same."""

    log_sample_ids: bool = False
    """Write samples.jsonl: the global sample ids of every step, in the order of the global batch."""


@dataclass(frozen=True)
class Profiling:
    """Where the time of a step and the memory of a device go."""

    enable_profiling: bool = False
    """Trace the steps up to each multiple of `profile_freq` on every rank, and record where their time went."""

    save_traces_folder: str = "profile_traces"
    """Folder of traces inside the run folder: iteration_N/rankR_trace.json.gz."""

    profile_freq: int = setting(10, minimum=1)
    """Steps between traces, and between snapshots of memory."""

    profiler_active: int = setting(1, minimum=1)
    """Steps in a trace."""

    profiler_warmup: int = setting(3, minimum=0)
    """Steps before those in which the profiler runs and keeps nothing: its first events are slow."""

    enable_memory_snapshot: bool = False
    """Keep the history of the CUDA allocator; write it at each multiple of `profile_freq`, and where memory runs
    out."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of those snapshots inside the run folder."""

    phases: bool = False
    """Write when each rank begins and ends the phases of its steps to phases/ in the run folder, by the host's clock;
    `torchtitan-lite trace` makes one picture of them."""


@dataclass(frozen=True)
class Data:
    """Preparation of the corpus."""

    cache_folder: str = ""
    """Where tokenizers and token shards are kept, for all runs. Empty: $TORCHTITAN_LITE_CACHE, else
    torchtitan_lite in the user's cache folder."""

    document_mask: bool = False
    """Tokens attend to their own document only; else to all before them in the sample."""

    mixture_paths: list[str] = field(default_factory=list)
    """Sources of dataset `mixture`, each a file or folder as in training.dataset_path, with epochs of its own."""

    mixture_weights: list[int] = field(default_factory=list)
    """Samples of each source among every sum-of-weights in a row, exactly: [3, 1] is three of the first to one of
    the second."""

    validation_fraction: float = setting(0.02, minimum=0.0, maximum=0.5)
    """Part of the documents that is held out for validation, chosen by a hash of each document's name."""


@dataclass(frozen=True)
class Debug:
    """Reproducibility, and what benchmarks change."""

    seed: int = setting(42, minimum=0, maximum=2**63 - 1)
    """Seed of initial weights and of the order of samples."""

    deterministic: bool = False
    """Deterministic kernels only; an operation without one raises."""

    replay_steps: list[int] = field(default_factory=list)
    """Steps whose forward and backward run twice, with room for the gradients twice; where their bits differ the run
    ends and names the rank. Needs `deterministic`."""

    detect_anomaly: bool = False
    """Look for NaN in what each operation of the backward gives; the run ends at the first and names the line of the
    forward that it belongs to. Slow."""

    moe_force_load_balance: bool = False
    """Send tokens to experts in turn, for a benchmark's even load; their scores weigh the experts all the same."""


@dataclass(frozen=True)
class JobConfig:
    """A recipe: one field a section."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    moe: MoE = field(default_factory=MoE)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    elastic: Elastic = field(default_factory=Elastic)
    faults: Faults = field(default_factory=Faults)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    data: Data = field(default_factory=Data)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    debug: Debug = field(default_factory=Debug)
