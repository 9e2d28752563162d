"""The reference's flags and variables by what they do here; only names are from it.

Flags: megatron/arguments.py of argonne-lcf/Megatron-DeepSpeed at ffa3456d, every name that it
declares. Variables: those its launcher, ezpz and their users set.
"""

from __future__ import annotations

from collections.abc import Mapping


def _names(text: str) -> list[str]:
    return text.split()


# A value that each flag with a value is tried with; the others are tried with 1.
VALUES: Mapping[str, str] = {
    "--adam-beta1": "0.9", "--adam-beta2": "0.95", "--attention-dropout": "0",
    "--constant-lr": "1e-4", "--data-file-list": "builtin", "--data-impl": "mmap",
    "--dataloader-type": "single", "--DDP-impl": "local", "--distributed-backend": "nccl",
    "--empty-unused-memory-level": "0", "--ffn-hidden-size": "256", "--hidden-dropout": "0",
    "--hidden-size": "128", "--hysteresis": "2", "--loss-scale-window": "1000",
    "--lr": "1e-3", "--lr-constant-fraction": "0.1", "--lr-cooldown-fraction": "0.1",
    "--lr-decay-style": "linear", "--lr-warmup-fraction": "0.1", "--lr-warmup-iters": "5",
    "--lr-warmup-tokens": "1e5", "--lr_constant_plus_cooldown_frac": "0.1",
    "--make-vocab-size-divisible-by": "128", "--min-lr": "0", "--mlp-type": "standard",
    "--multiprocessing-context": "fork", "--muon-momentum": "0.9", "--normalization": "rmsnorm",
    "--num-attention-heads": "4", "--num-key-value-heads": "2", "--num-layers": "4",
    "--optimizer": "adamw", "--profile": "pt", "--profile_steps": "2,3",
    "--profile-ranks": "0 1", "--rampup-batch-size": "16 16 64", "--recompute-granularity": "full",
    "--recompute-method": "uniform", "--remote-device": "none", "--seq-length": "128",
    "--sgd-momentum": "0.5", "--sophiag-beta1": "0.9", "--sophiag-beta2": "0.9",
    "--split": "990,10,0", "--timing-log-option": "minmax", "--tokenizer-model": "t.model",
    "--tokenizer-type": "Llama2Tokenizer", "--train-range-to-skip": "10 20 25 30",
    "--train-tokens": "1e6", "--transformer-impl": "local", "--vocab-extra-ids": "0",
    "--weight-decay-incr-style": "constant",
}  # fmt: skip

# They set an option.
WORK = _names("""
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-key-value-heads
--seq-length --rotary-position-embeddings-theta --layernorm-epsilon --init-method-std
--word-embedding-init-std --vocab-size --untie-embeddings-and-output-weights --micro-batch-size
--global-batch-size --rampup-batch-size --train-iters --train-samples --train-tokens
--exit-interval --exit-duration-in-mins --lr --min-lr --lr-decay-style --lr-decay-iters
--lr-warmup-fraction --lr-warmup-iters --lr-warmup-tokens --lr-warmup-samples
--lr-decay-samples --lr-decay-tokens --lr-constant-fraction
--lr-cooldown-fraction --lr_constant_plus_cooldown --lr_constant_plus_cooldown_frac --lr-finder
--constant-lr --timescale --optimizer --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum
--muon-momentum --sophiag-beta1 --sophiag-beta2 --sophiag-rho --weight-decay
--start-weight-decay --end-weight-decay --weight-decay-incr-style --clip-grad --bf16 --fp16
--seed --split --data-file-list --blend-sample-in-corpus --shuffle-sample-in-corpus
--data-cache-path --train-data-exact-num-epochs --tokenizer-type --tokenizer-model
--reset-position-ids --reset-attention-mask --eod-mask-loss --train-range-to-skip --save --load
--save-interval --exit-on-missing-checkpoint --finetune --no-load-optim --no-load-rng
--log-interval --eval-interval --eval-iters --log-params-norm --log-num-zeros-in-grad
--log-optimizer-states-to-tensorboard --tensorboard-dir --wandb-project --wandb-exp-name
--wandb-save-dir --timing-log-level --profile --profile_steps --profile-ranks --trace-dir
--tensor-model-parallel-size --pipeline-model-parallel-size --no-pipeline-parallel
--sequence-parallel --ds-sequence-parallel-size --zero-stage --cpu-optimizer
--distributed-timeout-minutes --checkpoint-activations --checkpoint-num-layers
--recompute-activations --recompute-granularity --recompute-num-layers
--deepspeed-activation-checkpointing
""")

# They ask for what is always so, or have no meaning here: accepted with a note.
NOTED = _names("""
--swiglu --use-rotary-position-embeddings --no-position-embedding --disable-bias-linear
--normalization --attention-dropout --hidden-dropout --rotary-percent
--make-vocab-size-divisible-by --no-query-key-layer-scaling --attention-softmax-in-fp32
--accumulate-allreduce-grads-in-fp32 --use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2
--use-flash-attn-triton --use-flash-attn-builder --no-masked-softmax-fusion
--no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
--no-persist-layer-norm --disable-mem-efficient-ln --data-impl --dataloader-type
--recompute-method --mlp-type --num-experts --DDP-impl --transformer-impl --remote-device
--vocab-extra-ids --empty-unused-memory-level --tensorboard-log-interval --loss-scale-window
--min-loss-scale --hysteresis --lazy-mpu-init --use-cpu-initialization --schedulefree-for-each
--cpu_torch_adam --ds_fused_adam --muon-nesterov --universal-checkpoint --use-checkpoint-args
--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler --no-load-lr-state
--no-initialization --adjust-word-embedding-init --exit-signal-handler --mmap-warmup
--zero-contigious-gradients --zero-reduce-scatter --contigious-checkpointing
--no-contiguous-buffers-in-local-ddp --log-timers-to-tensorboard --log-batch-size-to-tensorboard
--log-validation-ppl-to-tensorboard --log-memory-to-tensorboard --log-world-size-to-tensorboard
--no-barrier-with-level-1-timing --timing-log-option --tensorboard-queue-size
--num-workers --max-position-embeddings --distributed-backend --local-rank --local_rank
--multiprocessing-context
""")

# Refused with what to do instead.
REFUSED = _names("""
--lr-constant-tokens
--lr-cooldown-tokens --warmup --train-iters-to-skip --data-path --train-data-path
--valid-data-path --test-data-path --train-idx-path --train-desc-path --train-doc-idx-path
--train-sample-idx-path --train-shuffle-idx-path --aml-data-download-path --repeated-dataloader
--return-data-index --use-dataset-only --data-efficiency-curriculum-learning --random-ltd
--vocab-file --merge-file --trust-remote-code --encoder-seq-length --decoder-seq-length
--encoder-num-layers --decoder-num-layers --use-mics --kv-channels --batch-size
--model-parallel-size --num-layers-per-virtual-pipeline-stage --overlap-p2p-communication
--enable-zbh1-pipeline --enable-zbh1-exact-semantics --pipeline-model-parallel-split-rank
--standalone-embedding-stage --no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p
--no-async-tensor-model-parallel-allreduce --use-distributed-optimizer
--force-ds-sequence-parallel --zero-reduce-bucket-size --zero-allgather-bucket-size
--use-pin-memory --loss-scale --initial-loss-scale --fp32-residual-connection
--fp16-lm-cross-entropy --embedding-weights-in-fp32 --fp8-e4m3 --fp8-hybrid --no-fp8-wgrad
--fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo --apply-layernorm-1p
--apply-residual-connection-post-layernorm --openai-gelu --squared-relu --onnx-safe
--init-method-xavier-uniform --data-parallel-random-init --no-save-optim --no-save-rng
--load-tag --skip-train --kill-switch-file --distribute-saved-activations
--distribute-checkpointed-activations --partition-activations --checkpoint-in-cpu
--synchronize-each-layer --profile-backward --no-log-learnig-rate-to-tensorboard
--no-log-loss-scale-to-tensorboard --muon-ns-steps --muonadamw-beta1 --muonadamw-beta2
--muonadamw-eps
--muonclip-t --muonclip-alpha --dshampooadamw-max-preconditioner-dim
--dshampooadamw-precondition-freq --dshampooadamw-use-decoupled-weight-decay --dshampooadamw-eps
--adlr-autoresume --adlr-autoresume-interval --scattered-embeddings --split-transformers
--memory-centric-tiled-linear --tile-factor --ds-inference --inference
""")

# Of a program that this is not.
OUTSIDE = _names("""
--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction
--data-per-class-fraction --no-data-sharding --head-lr-mult --vision-pretraining
--vision-pretraining-type --vision-backbone-type --swin-backbone-type --mask-type --mask-factor
--iter-per-epoch --dino-local-img-size --dino-local-crops-number --dino-head-hidden-size
--dino-bottleneck-size --dino-freeze-last-layer --dino-norm-last-layer
--dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs --sample-rate
--bert-no-binary-head --mask-prob --short-seq-prob --retriever-seq-length
--output-bert-embeddings --bert-embedder-type --ict-head-size --biencoder-projection-dim
--biencoder-shared-query-context-model --ict-load --bert-load --titles-data-path
--query-in-block-prob --use-one-sent-docs --evidence-data-path
--retriever-report-topk-accuracies --retriever-score-scaling --block-data-path --embedding-path
--indexer-batch-size --indexer-log-interval --retro-workdir --retro-add-retriever
--retro-cyclic-train-iters --retro-encoder-layers --retro-encoder-hidden-dropout
--retro-encoder-attention-dropout --retro-num-neighbors --retro-num-retrieved-chunks
--retro-return-doc-ids --topk --expert-interval --num-experts-switch
--disable-moe-token-dropping --moe-train-capacity-factor --moe-eval-capacity-factor
--moe-min-capacity --moe-loss-coeff --create-moe-param-group
--disable-moe-top2-2nd-expert-sampling --use-tutel --enable-expert-tensor-parallelism
--moe-expert-parallel-size --num-layers-teacher --num-experts-teacher --hidden-size-teacher
--num-attention-heads-teacher --mos --kd --kd-alpha-ce --kd-beta-ce --kd-temp --reset-iteration
--load-teacher --inference-batch-times-seqlen-threshold --max-tokens-to-oom
""")

# Bare flags of the reference: its parser gives them no value.
BARE = frozenset(
    flag
    for flag in (*WORK, *NOTED)
    if flag.startswith(("--no-", "--use-", "--log-", "--disable-", "--zero-", "--reset-"))
    and flag not in ("--log-interval", "--zero-stage")
) | frozenset(
    _names("""
--untie-embeddings-and-output-weights --lr_constant_plus_cooldown --lr-finder --bf16 --fp16
--blend-sample-in-corpus --shuffle-sample-in-corpus --eod-mask-loss --exit-on-missing-checkpoint
--finetune --sequence-parallel --cpu-optimizer --checkpoint-activations --recompute-activations
--deepspeed-activation-checkpointing --swiglu --attention-softmax-in-fp32
--accumulate-allreduce-grads-in-fp32 --lazy-mpu-init --schedulefree-for-each --cpu_torch_adam
--ds_fused_adam --muon-nesterov --universal-checkpoint --override-opt_param-scheduler
--adjust-word-embedding-init --exit-signal-handler --mmap-warmup --contigious-checkpointing
""")
)

# Variables that set an option, with a value to try.
VARIABLES_THAT_WORK = _names("""
MODEL_ARCH NLAYERS NUM_LAYERS HIDDEN HEADS NHEADS NUM_KV_HEAD FFN_HIDDEN_SIZE SEQ SEQ_LEN TP PP
SP ZERO_STAGE ZERO_HPZ_PARTITION_SIZE MICS_SHARD_SIZE CPU_OPTIMIZER NGPU_PER_HOST NHOSTS
WORLD_SIZE HOSTFILE MICRO_BATCH GRAD_ACC_STEPS GAS GLOBAL_BATCH TRAIN_TOKENS TRAIN_ITERS
TRAIN_ITER OPT OPTIMIZER OPTIM ADAM_BETA1 ADAM_BETA2 ADAM_EPS WEIGHT_DECAY CLIP_GRAD LR
LR_DECAY_STYLE LR_WARMUP_FRAC LR_WARMUP_FRACTION LR_DECAY_ITERS DTYPE NO_FLASH_ATTN
USE_ACTIVATION_CHECKPOINTING ACT_CKPT_NUM_LAYERS ROPE_THETA EVAL_INTERVAL EVAL_ITERS
LOG_INTERVAL SAVE_INTERVAL NO_TENSORBOARD DATA_FILE_LIST TOKENIZER_TYPE TOKENIZER_MODEL
TRAIN_SPLIT VAL_SPLIT TEST_SPLIT CKPT_DIR SAVE LOAD DEBUG WB_PROJECT WANDB_PROJECT WANDB_MODE
WANDB_DISABLED LOG_LEVEL DUMP_TOKENS DUMP_SKIPPED_ITERS CPU_BIND LAUNCH_WITH LR_WARMUP_ITERS
EXIT_INTERVAL EXIT_DURATION_IN_MINS TRAIN_SAMPLES RAMPUP_BATCH_SIZE FINETUNE LR_FINDER
TENSORBOARD_DIR BLEND_SAMPLE_IN_CORPUS DATA_CACHE_PATH TRAIN_DATA_EXACT_NUM_EPOCHS
SHUFFLE_SAMPLE_IN_CORPUS WANDB_NAME WANDB_RUN_ID WANDB_DIR TIMING_LOG_LEVEL PROFILE
LOG_FROM_ALL_RANKS VALID_DATA_FILE_LIST
""")

# Named with what holds; no setting of a user's is lost by them.
VARIABLES_NAMED = _names("""
NO_LLAMA OVERRIDE_CKPT_OPT_PARAM COMMS_LOGGER TIMING_STR DATA_PARENT EXEC
DLIO_PROFILER_DATASET_DIR LAUNCH_CMD
EZPZ_LOG_LEVEL TORCH_DEVICE TORCH_BACKEND
UNIVERSAL_CHECKPOINT NUM_WORKERS DISTRIBUTED_BACKEND NJOBS
""")

# Meant as an option: refused in a job, named first and last elsewhere; with the right name.
VARIABLES_MEANT = {
    "INIT_METHOD_STD": "--init-method-std", "LAYERNORM_EPSILON": "RMS_NORM_EPS",
    "EXIT_ON_MISSING_CHECKPOINT": "--exit-on-missing-checkpoint", "LR_WARMUP": "LR_WARMUP_ITERS",
    "NUM_KV_HEADS": "NUM_KV_HEAD", "BATCH_SIZE": "MICRO_BATCH", "ZERO": "ZERO_STAGE",
    "CHECKPOINT_DIR": "CKPT_DIR", "ACTIVATION_CHECKPOINTING": "USE_ACTIVATION_CHECKPOINTING",
    "EVAL_ITER": "EVAL_ITERS", "SAVE_INTVAL": "SAVE_INTERVAL",
    "LR_COOLDOWN_FRAC": "LR_COOLDOWN_FRACTION", "TENSOR_PARALLEL": "TP", "NLAYER": "NLAYERS",
    "N_LAYERS": "NLAYERS", "NUM_LAYER": "NLAYERS", "HIDDEN_SIZE": "HIDDEN", "NUM_HEADS": "HEADS",
    "LEARNING_RATE": "LR", "OPTIMISER": "OPT", "TRAIN_STEPS": "TRAIN_ITERS",
    "STEPS": "TRAIN_ITERS", "MAX_STEPS": "TRAIN_ITERS", "EPOCHS": "TRAIN_TOKENS",
    "NPROC": "WORLD_SIZE", "NPROC_PER_NODE": "NGPU_PER_HOST",
    "ACT_CKPT": "USE_ACTIVATION_CHECKPOINTING", "BF16": "DTYPE",
    "LR_COOLDOWN_TOKENS": "--lr-cooldown-fraction", "FP8_HYBRID": "--fp8",
    "SKIP_TRAIN": "tools/evaluate.py",
}  # fmt: skip
