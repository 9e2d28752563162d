"""Megatron-DeepSpeed's flags that are no option here: what holds instead, by class.

A flag of the reference is an option of the schema, a shorthand for one (SHORTHANDS, RENAMED), noted
because it asks for what is always so (ALWAYS, ALWAYS_VALUED, ONLY), refused with what to do
(REFUSED), or part of a program that this is not (ELSEWHERE).
"""

from __future__ import annotations

from collections.abc import Mapping

# Bare flags that set one option to a fixed value.
SHORTHANDS: dict[str, tuple[str, str]] = {
    "--bf16": ("train.dtype", "bf16"),
    "--fp16": ("train.dtype", "fp16"),
    "--fp32": ("train.dtype", "fp32"),
    "--checkpoint-activations": ("train.activation_checkpointing", "1"),
    "--deepspeed-activation-checkpointing": ("train.activation_checkpointing", "1"),
    "--recompute-activations": ("train.activation_checkpointing", "selective"),
    "--untie-embeddings-and-output-weights": ("model.tie_embeddings", "0"),
    "--no-pipeline-parallel": ("parallel.pipeline_parallel", "1"),
    "--lr_constant_plus_cooldown": ("optimizer.lr_decay_style", "warmup-stable-decay"),
}

# Flags with a value that are other names of an option, and what to know about the value.
RENAMED: dict[str, tuple[str, str]] = {
    "--lr_constant_plus_cooldown_frac": (
        "optimizer.lr_decay_fraction",
        "it is the share of LR_DECAY_ITERS that cools, as in the reference's scheduler; where you "
        "mean the share at a constant rate, give 1 minus it",
    ),
}

_FUSION = "there is no such fusion"
_FLASH = "torch picks the fastest attention kernel"
_NOW = "the options given now always hold"
_LOGGED = "it is always in metrics.jsonl"
_TIMED = "steps are always timed, without a barrier"
_BUFFERS = "DeepSpeed's buffers are contiguous"

# Bare flags whose effect is always on, or that have no meaning here.
ALWAYS: dict[str, str] = {
    "--swiglu": "the MLP is SwiGLU",
    "--use-rotary-position-embeddings": "positions are rotary",
    "--no-position-embedding": "positions are rotary",
    "--disable-bias-linear": "linear layers have no bias",
    "--no-query-key-layer-scaling": "attention scores are not scaled by layer",
    "--accumulate-allreduce-grads-in-fp32": "bf16 gradients are averaged in fp32",
    "--attention-softmax-in-fp32": "the softmax is computed in fp32",
    "--deepspeed": "DeepSpeed is the engine",
    "--no-masked-softmax-fusion": _FUSION,
    "--no-bias-gelu-fusion": _FUSION,
    "--no-bias-dropout-fusion": _FUSION,
    "--no-gradient-accumulation-fusion": _FUSION,
    "--no-persist-layer-norm": "RMSNorm is torch's",
    "--disable-mem-efficient-ln": "RMSNorm is torch's",
    "--use-flash-attn": _FLASH,
    "--use-flash-attn-v1": _FLASH,
    "--use-flash-attn-v2": _FLASH,
    "--use-flash-attn-triton": _FLASH,
    "--use-flash-attn-builder": _FLASH,
    "--lazy-mpu-init": "groups are made when they are needed",
    "--use-cpu-initialization": "weights are drawn from the seed and their name on any device",
    "--schedulefree-for-each": "the library chooses its kernels",
    "--cpu_torch_adam": "the optimizer's step is torch's, on the host too",
    "--ds_fused_adam": "torch's fused kernel does the same update",
    "--muon-nesterov": "Muon's momentum is Nesterov's",
    "--universal-checkpoint": "every checkpoint resumes under any layout",
    "--use-checkpoint-args": "the model in the checkpoint is compared with the options; "
    "--resume RUN takes the options of a run",
    "--override-opt_param-scheduler": _NOW,
    "--use-checkpoint-opt_param-scheduler": f"{_NOW}: give those of the checkpoint's run, "
    "or --resume RUN, which takes them from it",
    "--no-load-lr-state": "the learning rate follows from the step's number and is never loaded",
    "--no-initialization": "no weight is drawn that a checkpoint brings",
    "--adjust-word-embedding-init": "--word-embedding-init-std alone sets the embedding's "
    "deviation, where it is given",
    "--exit-signal-handler": "SIGTERM, SIGINT and SIGUSR1 always save a checkpoint and stop",
    "--mmap-warmup": "the operating system keeps what is read",
    "--zero-contigious-gradients": _BUFFERS,
    "--zero-reduce-scatter": "ZeRO reduces each gradient to its owner",
    "--contigious-checkpointing": "kept activations are not copied",
    "--no-contiguous-buffers-in-local-ddp": _BUFFERS,
    "--log-timers-to-tensorboard": "what --timing-log-level asks for goes to every tracker",
    "--log-batch-size-to-tensorboard": _LOGGED,
    "--log-validation-ppl-to-tensorboard": _LOGGED,
    "--log-memory-to-tensorboard": _LOGGED,
    "--log-world-size-to-tensorboard": _LOGGED,
    "--no-barrier-with-level-1-timing": _TIMED,
}

# The same for flags with a value.
ALWAYS_VALUED: dict[str, str] = {
    "--num-workers": "one thread reads ahead of the steps",
    "--max-position-embeddings": "rotary positions have no table; --seq-length decides",
    "--distributed-backend": "the backend follows from the device",
    "--local-rank": "ranks come from the launcher's variables",
    "--local_rank": "ranks come from the launcher's variables",
    "--timing-log-option": "times are logged as (min, max) over the ranks",
    "--tensorboard-queue-size": "TensorBoard's files are flushed every 30 s",
    "--multiprocessing-context": "data is read by a thread",
}

# Flags of which only some values are supported.
ONLY: dict[str, tuple[str, ...]] = {
    "--normalization": ("rmsnorm", "RMSNorm"),
    "--hidden-dropout": ("0", "0.0"),
    "--attention-dropout": ("0", "0.0"),
    "--make-vocab-size-divisible-by": ("128",),
    "--rotary-percent": ("1", "1.0"),
    "--data-impl": ("mmap", "infer"),
    "--dataloader-type": ("single",),
    "--recompute-method": ("uniform",),
    "--mlp-type": ("standard",),
    "--num-experts": ("1",),
    "--DDP-impl": ("local",),
    "--transformer-impl": ("local",),
    "--remote-device": ("none",),
    "--vocab-extra-ids": ("0",),
    "--empty-unused-memory-level": ("0",),
    "--tensorboard-log-interval": ("1",),
    "--loss-scale-window": ("1000",),
    "--min-loss-scale": ("1", "1.0"),
    "--hysteresis": ("2",),
}

_FP16 = "fp16 scales its loss dynamically"
_BLOCKS = "blocks are pre-norm RMSNorm, rotary attention and SwiGLU"
_FP8 = "use --fp8 1 or --fp8 rowwise: torchao scales by the present values, with e4m3 and e5m2"
_LIST = "write `weight prefix corpus` lines into a file for --data-file-list"
_ORDER = "the sample order is computed; --data-order megatron keeps its own in --data-cache-path"
_SHAMPOO = "distributed Shampoo is not offered: use --optimizer muon"
_CLIP = "muonclip is not offered: use --optimizer muon"
_ADAMW = "use --adam-beta1, --adam-beta2 and --adam-eps: they are those of Muon's AdamW part"
_BUCKETS = "buckets are sized by the model, at most 200 million elements"
_RECOMPUTE = "use --recompute-granularity 1 or selective; --sequence-parallel shards activations"
_PIPE = "use --pipeline-schedule 1f1b or dualpipev"
_LENGTH = "a decoder has one length: use --seq-length"
_LAYERS = "a decoder has one stack: use --num-layers"

# Flags that are refused, with what to do instead.
REFUSED: dict[str, str] = {
    "--lr-constant-tokens": "use --lr-constant-fraction",
    "--lr-cooldown-tokens": "use --lr-cooldown-fraction",
    "--warmup": "use --lr-warmup-fraction",
    "--train-iters-to-skip": "use --train-range-to-skip first last",
    "--data-path": _LIST,
    "--train-data-path": "use --data-file-list and TRAIN_SPLIT",
    "--valid-data-path": "write its lines into a list and use --valid-data-file-list LIST",
    "--test-data-path": "write its lines into a list and use --test-data-file-list LIST",
    "--train-idx-path": _ORDER,
    "--train-desc-path": _ORDER,
    "--train-doc-idx-path": _ORDER,
    "--train-sample-idx-path": _ORDER,
    "--train-shuffle-idx-path": _ORDER,
    "--aml-data-download-path": _LIST,
    "--repeated-dataloader": "data is read again, epoch after epoch, as long as steps need it",
    "--return-data-index": "tools/inspect_batch.py prints where the samples of a step come from",
    "--use-dataset-only": "tools/check_data.py reads the data alone",
    "--data-efficiency-curriculum-learning": "samples have one length and one order: use "
    "several lists with `start_tokens` for stages",
    "--random-ltd": "every layer sees every token",
    "--vocab-file": "give the file to --tokenizer-model",
    "--merge-file": "give its folder to --tokenizer-model",
    "--trust-remote-code": "no code of a tokenizer is ever run; use one that needs none",
    "--encoder-seq-length": _LENGTH,
    "--decoder-seq-length": _LENGTH,
    "--encoder-num-layers": _LAYERS,
    "--decoder-num-layers": _LAYERS,
    "--deepspeed_config": "the DeepSpeed configuration is made from the other options; "
    "DRY_RUN=1 prints it",
    "--deepscale": "DeepSpeed is the engine",
    "--deepscale_config": "DeepSpeed is the engine, configured by the other options",
    "--config": "it is how ranks are given their configuration; --resume RUN takes that of a run",
    "--use-mics": "use --mics-shard-size",
    "--kv-channels": "it is --hidden-size / --num-attention-heads, or --head-dim",
    "--batch-size": "use --micro-batch-size",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--num-layers-per-virtual-pipeline-stage": _PIPE,
    "--overlap-p2p-communication": _PIPE,
    "--enable-zbh1-pipeline": _PIPE,
    "--enable-zbh1-exact-semantics": _PIPE,
    "--pipeline-model-parallel-split-rank": "use --pipeline-cuts",
    "--standalone-embedding-stage": "use --pipeline-cuts, with fewer layers in the first stage",
    "--no-scatter-gather-tensors-in-pipeline": "what a stage sends follows from TP",
    "--use-ring-exchange-p2p": "stages send to their neighbours",
    "--no-async-tensor-model-parallel-allreduce": "the all-reduce of a backward pass is in order",
    "--use-distributed-optimizer": "use --zero-stage 1",
    "--force-ds-sequence-parallel": "use --ds-sequence-parallel-size, which works with any TP",
    "--zero-reduce-bucket-size": _BUCKETS,
    "--zero-allgather-bucket-size": _BUCKETS,
    "--use-pin-memory": "use --cpu-optimizer",
    "--loss-scale": _FP16,
    "--initial-loss-scale": _FP16,
    "--fp32-residual-connection": "the residual stream has --dtype",
    "--fp16-lm-cross-entropy": "the loss is computed in fp32",
    "--embedding-weights-in-fp32": "all weights have --dtype, with fp32 masters in the optimizer",
    "--fp8-e4m3": _FP8,
    "--fp8-hybrid": _FP8,
    "--no-fp8-wgrad": _FP8,
    "--fp8-margin": _FP8,
    "--fp8-interval": _FP8,
    "--fp8-amax-history-len": _FP8,
    "--fp8-amax-compute-algo": _FP8,
    "--apply-layernorm-1p": _BLOCKS,
    "--apply-residual-connection-post-layernorm": _BLOCKS,
    "--openai-gelu": _BLOCKS,
    "--squared-relu": _BLOCKS,
    "--onnx-safe": "a checkpoint is exported to Hugging Face: tools/convert_hf.py",
    "--init-method-xavier-uniform": "weights are normal: use --init-method-std",
    "--data-parallel-random-init": "every replica starts from the same weights",
    "--no-save-optim": "a checkpoint holds the optimizer; --export-hf saves weights alone as well",
    "--no-save-rng": "a checkpoint holds the random states, some kilobytes",
    "--load-tag": "the newest sound step of LOAD is taken; move later ones away for an older one",
    "--skip-train": "tools/evaluate.py evaluates a checkpoint",
    "--kill-switch-file": "make the file STOP in the run's folder: the run saves and stops",
    "--distribute-saved-activations": _RECOMPUTE,
    "--distribute-checkpointed-activations": _RECOMPUTE,
    "--partition-activations": _RECOMPUTE,
    "--checkpoint-in-cpu": _RECOMPUTE,
    "--synchronize-each-layer": _RECOMPUTE,
    "--profile-backward": "use --timing-log-level 1, whose times have the backward pass",
    "--no-log-learnig-rate-to-tensorboard": "all metrics are logged; --no-tensorboard leaves "
    "TensorBoard out",
    "--no-log-loss-scale-to-tensorboard": "all metrics are logged; --no-tensorboard leaves "
    "TensorBoard out",
    "--muon-ns-steps": "Muon takes five Newton-Schulz steps",
    "--muonadamw-beta1": _ADAMW,
    "--muonadamw-beta2": _ADAMW,
    "--muonadamw-eps": _ADAMW,
    "--muonclip-t": _CLIP,
    "--muonclip-alpha": _CLIP,
    "--dshampooadamw-max-preconditioner-dim": _SHAMPOO,
    "--dshampooadamw-precondition-freq": _SHAMPOO,
    "--dshampooadamw-use-decoupled-weight-decay": _SHAMPOO,
    "--dshampooadamw-eps": _SHAMPOO,
    "--adlr-autoresume": "a job of the same run resumes by itself",
    "--adlr-autoresume-interval": "a job of the same run resumes by itself",
    "--scattered-embeddings": "use --tensor-model-parallel-size",
    "--split-transformers": "use --tensor-model-parallel-size",
    "--memory-centric-tiled-linear": "use --tensor-model-parallel-size",
    "--tile-factor": "use --tensor-model-parallel-size",
    "--ds-inference": "a run ends with a sample of text; tools/convert_hf.py exports the model",
    "--inference": "a run ends with a sample of text; tools/convert_hf.py exports the model",
}

# What this program is not -> the flags of it.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "vision models are not trained": (
        "--num-classes", "--img-h", "--img-w", "--num-channels", "--patch-dim",
        "--classes-fraction", "--data-per-class-fraction", "--no-data-sharding", "--head-lr-mult",
        "--vision-pretraining", "--vision-pretraining-type", "--vision-backbone-type",
        "--swin-backbone-type", "--mask-type", "--mask-factor", "--iter-per-epoch",
        "--dino-local-img-size", "--dino-local-crops-number", "--dino-head-hidden-size",
        "--dino-bottleneck-size", "--dino-freeze-last-layer", "--dino-norm-last-layer",
        "--dino-warmup-teacher-temp", "--dino-teacher-temp", "--dino-warmup-teacher-temp-epochs",
        "--sample-rate",
    ),
    "BERT, T5 and retrievers are not trained": (
        "--bert-no-binary-head", "--mask-prob", "--short-seq-prob", "--retriever-seq-length",
        "--output-bert-embeddings", "--bert-embedder-type", "--ict-head-size",
        "--biencoder-projection-dim", "--biencoder-shared-query-context-model", "--ict-load",
        "--bert-load", "--titles-data-path", "--query-in-block-prob", "--use-one-sent-docs",
        "--evidence-data-path", "--retriever-report-topk-accuracies", "--retriever-score-scaling",
        "--block-data-path", "--embedding-path", "--indexer-batch-size", "--indexer-log-interval",
    ),
    "Retro is not trained": (
        "--retro-workdir", "--retro-add-retriever", "--retro-cyclic-train-iters",
        "--retro-encoder-layers", "--retro-encoder-hidden-dropout",
        "--retro-encoder-attention-dropout", "--retro-num-neighbors",
        "--retro-num-retrieved-chunks", "--retro-return-doc-ids",
    ),
    "models are dense, without experts": (
        "--topk", "--expert-interval", "--num-experts-switch", "--disable-moe-token-dropping",
        "--moe-train-capacity-factor", "--moe-eval-capacity-factor", "--moe-min-capacity",
        "--moe-loss-coeff", "--create-moe-param-group", "--disable-moe-top2-2nd-expert-sampling",
        "--use-tutel", "--enable-expert-tensor-parallelism", "--moe-expert-parallel-size",
    ),
    "there is no distillation": (
        "--num-layers-teacher", "--num-experts-teacher", "--hidden-size-teacher",
        "--num-attention-heads-teacher", "--mos", "--kd", "--kd-alpha-ce", "--kd-beta-ce",
        "--kd-temp", "--reset-iteration", "--load-teacher",
    ),
    "text is not served": ("--inference-batch-times-seqlen-threshold", "--max-tokens-to-oom"),
}  # fmt: skip

# Flag -> what this program is not.
OUTSIDE: Mapping[str, str] = {flag: what for what, flags in ELSEWHERE.items() for flag in flags}
