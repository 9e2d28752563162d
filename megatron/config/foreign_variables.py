"""Variables that are no option here, and what holds: other frameworks' words, the reference's own.

Data only; strays.py finds them in an environment.
"""

from __future__ import annotations

# What other frameworks and launchers call our options: refused in a job.
FOREIGN_SPELLINGS: dict[str, str] = {
    # shape
    "NUM_HEADS": "HEADS", "N_HEADS": "HEADS", "N_HEAD": "HEADS", "N_LAYERS": "NLAYERS",
    "N_LAYER": "NLAYERS", "NUM_HIDDEN_LAYERS": "NLAYERS", "NUM_LAYER": "NLAYERS",
    "D_MODEL": "HIDDEN", "N_EMBD": "HIDDEN", "EMBED_DIM": "HIDDEN",
    "FFN_SIZE": "FFN_HIDDEN_SIZE", "INTERMEDIATE_SIZE": "FFN_HIDDEN_SIZE",
    "NUM_KV_HEADS": "NUM_KV_HEAD", "N_KV_HEADS": "NUM_KV_HEAD", "KV_HEADS": "NUM_KV_HEAD",
    "BLOCK_SIZE": "SEQ", "MAX_SEQ_LEN": "SEQ", "MAX_SEQ_LENGTH": "SEQ", "CONTEXT_LENGTH": "SEQ",
    "MODEL_NAME": "MODEL_ARCH", "MODEL_SIZE": "MODEL_ARCH",
    # layout
    "TP_SIZE": "TP", "PP_SIZE": "PP", "SP_SIZE": "SP",
    "TENSOR_PARALLEL": "TP", "PIPELINE_PARALLEL": "PP",
    "ZERO": "ZERO_STAGE", "DEEPSPEED_STAGE": "ZERO_STAGE",
    "NGPUS_PER_HOST": "NGPU_PER_HOST", "NPROC_PER_NODE": "NGPU_PER_HOST",
    "GPUS_PER_NODE": "NGPU_PER_HOST", "NGPUS_PER_NODE": "NGPU_PER_HOST",
    "NPROC": "WORLD_SIZE", "NRANKS": "WORLD_SIZE", "NUM_NODES": "NHOSTS", "NNODES": "NHOSTS",
    # length, batch and rate
    "LEARNING_RATE": "LR", "MAX_LR": "LR", "PEAK_LR": "LR", "MIN_LEARNING_RATE": "MIN_LR",
    "WARMUP_FRAC": "LR_WARMUP_FRAC", "WARMUP_RATIO": "LR_WARMUP_FRAC",
    "LR_WARMUP": "LR_WARMUP_ITERS", "WARMUP_STEPS": "LR_WARMUP_ITERS",
    "WARMUP_ITERS": "LR_WARMUP_ITERS", "LR_WARMUP_STEPS": "LR_WARMUP_ITERS",
    "LR_SCHEDULER": "LR_DECAY_STYLE", "LR_SCHEDULER_TYPE": "LR_DECAY_STYLE",
    "BATCH_SIZE": "MICRO_BATCH", "MBS": "MICRO_BATCH", "GBS": "GLOBAL_BATCH",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "MICRO_BATCH", "LOCAL_BATCH_SIZE": "MICRO_BATCH",
    "GRAD_ACCUM_STEPS": "GRAD_ACC_STEPS", "GRADIENT_ACCUMULATION_STEPS": "GRAD_ACC_STEPS",
    "TRAIN_STEPS": "TRAIN_ITERS", "STEPS": "TRAIN_ITERS", "MAX_STEPS": "TRAIN_ITERS",
    "NUM_STEPS": "TRAIN_ITERS", "MAX_ITERS": "TRAIN_ITERS", "ITERS": "TRAIN_ITERS",
    "EPOCHS": "TRAIN_TOKENS", "NUM_EPOCHS": "TRAIN_TOKENS", "NUM_TRAIN_EPOCHS": "TRAIN_TOKENS",
    "MAX_GRAD_NORM": "CLIP_GRAD", "GRAD_CLIP": "CLIP_GRAD", "OPTIMISER": "OPT",
    "MOMENTUM": "SGD_MOMENTUM", "BETA1": "ADAM_BETA1", "BETA2": "ADAM_BETA2",
    # data, checkpoints and the rest
    "TOKENIZER": "TOKENIZER_MODEL", "DATA_LIST": "DATA_FILE_LIST",
    "DATA_PATH": "DATA", "TRAIN_DATA": "DATA", "TRAIN_FILE": "DATA", "DATASET": "DATA",
    "TEXT_COLUMN": "DATA_KEY", "SPLIT": "TRAIN_SPLIT",
    "PRECISION": "DTYPE", "TORCH_DTYPE": "DTYPE",
    "CHECKPOINT_DIR": "CKPT_DIR", "SAVE_DIR": "CKPT_DIR", "OUTPUT_DIR": "RUN_DIR",
    "SAVE_STEPS": "SAVE_INTERVAL", "SAVE_EVERY": "SAVE_INTERVAL", "EVAL_STEPS": "EVAL_INTERVAL",
    "LOGGING_STEPS": "LOG_INTERVAL", "LOG_EVERY": "LOG_INTERVAL",
    "RESUME_FROM_CHECKPOINT": "RESUME", "PROJECT_NAME": "WANDB_PROJECT",
    "ACT_CKPT": "USE_ACTIVATION_CHECKPOINTING",
    "ACTIVATION_CHECKPOINTING": "USE_ACTIVATION_CHECKPOINTING",
    "GRADIENT_CHECKPOINTING": "USE_ACTIVATION_CHECKPOINTING", "FLASH_ATTN": "NO_FLASH_ATTN",
    "LAUNCHER": "LAUNCH_WITH",
}  # fmt: skip

_PROFILER = "set PROFILE=torch or PROFILE=pyinstrument"
_DEVICE = "set DEVICE=cpu, cuda or xpu"

# Variables of the AuroraGPT launcher, of ezpz, of profilers and of W&B, and what holds: named.
WITHOUT_EFFECT: dict[str, str] = {
    "NO_LLAMA": "every model is Llama-shaped",
    "OVERRIDE_CKPT_OPT_PARAM": "the options given now always hold",
    "DATA_PARENT": "set DATA_FILE_LIST",
    "TIMING_STR": "give flags on the command line",
    "COMMS_LOGGER": "there is no communication log",
    "EXEC": "the entry point is pretrain_gpt_alcf.py",
    "LAUNCH_CMD": "the launch command is made from the machine's entry; LAUNCH_WITH chooses",
    "NJOBS": "`python -m megatron.launch submit --chain N` submits a chain of jobs",
    "USE_MICS": "set MICS_SHARD_SIZE",
    "DLIO_PROFILER_DATASET_DIR": _PROFILER,
    "NSYS_PROFILE": _PROFILER,
    "EZPZ_LOG_LEVEL": "set LOG_LEVEL",
    "EZPZ_SCHEDULER": "the scheduler is known by its job's variables",
    "TORCH_DEVICE": _DEVICE,
    "TORCH_BACKEND": f"the backend follows from the device: {_DEVICE}",
    "TORCH_DDP_TIMEOUT": "set DISTRIBUTED_TIMEOUT_MINUTES",
    "WANDB_RESUME": "a run resumes its W&B run by itself",
}

# The reference's switches of one value of an option; 0 leaves it alone.
SWITCHES: dict[str, tuple[str, str]] = {
    "TORCH_PROFILER_ENABLE": ("log.profile", "torch"),
    "PYINSTRUMENT_PROFILER": ("log.profile", "pyinstrument"),
}

# Variables of shells, compilers, launchers and schedulers that happen to resemble ours.
NOT_OURS = frozenset((
    "COMPILER", "HOSTNAME", "HOSTTYPE", "HOST", "HOSTS", "LOCAL_WORLD_SIZE", "LOCAL_RANK",
    "NGPUS", "CONFIG", "HISTFILE", "LOGLEVEL", "WORKING_DIR", "DIST_LAUNCH",
))  # fmt: skip
NOT_OURS_PREFIXES = (
    "PBS_", "SLURM_", "PMI_", "PMIX_", "PALS_", "OMPI_", "MPICH_", "NCCL_", "CCL_", "FI_", "ZE_",
    "SYCL_", "CUDA_", "HIP_", "ROCR_", "TORCH_", "TORCHELASTIC_", "OMP_", "MKL_", "CONDA_", "XDG_",
    "LC_", "SSH_", "HF_", "GITHUB_", "EZPZ_", "_",
)  # fmt: skip
