"""The commands of the published experiments and the reference's daily ones, as they were typed.

A command that stands for several has a placeholder of its document filled in (`<nlayers>`, `GAS`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command, and how it fares.

    Attributes:
        line: of its document: seed and line, or the reference's file.
        text: as typed.
        hosts: of the job.
        differs: what is different here on purpose; empty: nothing.
    """

    line: str
    text: str
    hosts: int = 2
    differs: str = ""


SMALL = """MODEL_ARCH={arch} \\
        NLAYERS={layers} \\
        GRAD_ACC_STEPS=2 \\
        MICRO_BATCH=1 \\
        USE_ACTIVATION_CHECKPOINTING=0 \\
        ZERO_STAGE=0 \\
        OPT=adamw \\
        LR_DECAY_STYLE=constant \\
        TOKENIZER_TYPE=HFTokenizer \\
        TOKENIZER_MODEL=google/gemma-7b \\
        DATA_FILE_LIST=ALCF/data-lists/$(ezpz_get_machine_name)/books.txt \\
        bash train_alcf.sh"""

PIPELINE_70B = """PP="${NHOSTS}" \\
  TP=1 \\
  HEADS=64 \\
  NLAYERS=80 \\
  NUM_KV_HEAD=8 \\
  FFN_HIDDEN_SIZE=28672 \\
  HIDDEN=8192 \\
  MICRO_BATCH=1 \\
  GRAD_ACC_STEPS="${GAS}" \\
  SEQ_LEN=8192 \\
  DATA_FILE_LIST=ALCF/data-lists/aurora/books.txt \\
  USE_ACTIVATION_CHECKPOINTING=1 \\
  bash train_alcf.sh"""

TENSOR_42B = (
    "TP=6 PP=1 HEADS=$((TP * $((48 / TP)))) NLAYERS=$((TP * $((48 / TP))))"
    " NUM_KV_HEAD=$((TP * $((8 / TP)))) FFN_HIDDEN_SIZE=$((TP * $((28672 / TP))))"
    " HIDDEN=$((HEADS * $((8192 / HEADS)))) ZERO_STAGE=2 MICRO_BATCH=1 GRAD_ACC_STEPS=1"
    " DATA_FILE_LIST=ALCF/data-lists/aurora/books.txt bash train_alcf.sh"
)

SKIP = """PBS_O_WORKDIR=$(pwd) bash train_aGPT_7B.sh \\
    --train-range-to-skip 10 20 25 30"""

WORKSHOP = """launch python3 -m wordplay \\
    train.backend=DDP train.eval_interval=100 data=shakespeare train.dtype=bf16 \\
    model.batch_size=64 model.block_size=1024 train.max_iters=1000 train.log_interval=10 \\
    train.compile=false"""

# Published sizes: architecture, layers -> parameters.
SIZES = {
    ("llama3-3B", 4): 1_975_544_832,
    ("llama3-3B", 6): 2_176_883_712,
    ("llama3-3B", 8): 2_378_222_592,
    ("llama3-3B", 10): 2_579_561_472,
    ("llama3-3B", 12): 2_780_900_352,
    ("llama3-3B", 14): 2_982_239_232,
    ("smollm3-3B", 8): 1_673_562_112,
    ("smollm3-3B", 10): 1_829_808_128,
    ("smollm3-3B", 12): 1_986_054_144,
    ("smollm3-3B", 14): 2_142_300_160,
    ("smollm3-3B", 16): 2_298_546_176,
    ("smollm3-3B", 18): 2_454_792_192,
}

# Published rows of the 70B model: hosts, TP, GAS -> DP, GBS, TFLOPS, tokens per GPU and second.
ROWS_70B = {
    (8, 1, 1): (12, 12, None, None),
    (8, 2, 1): (6, 6, 10.26, 23.084),
    (8, 2, 2): (6, 12, 17.75, 39.927),
    (8, 2, 4): (6, 24, 28.93, 65.081),
    (8, 2, 8): (6, 48, 42.27, 95.103),
    (8, 2, 16): (6, 96, 54.66, 122.974),
    (8, 2, 32): (6, 192, 64.02, 144.037),
    (16, 1, 1): (12, 12, 5.6, 12.695),
    (16, 1, 2): (12, 24, 10.25, 23.064),
    (16, 1, 4): (12, 48, 18.10, 40.713),
    (16, 1, 8): (12, 96, 29.49, 66.342),
    (16, 1, 16): (12, 192, None, None),
}

# Published rows of ZeRO-3 with hpZ: hosts, GAS -> GBS.
ROWS_HPZ = {(4, 1): 48, (6, 1): 72, (8, 1): 96, (8, 2): 192, (8, 4): 384, (8, 8): 768,
            (16, 1): 192, (16, 2): 384}  # fmt: skip

# Daily commands of the reference that go another way here: its file, its command, ours, the test.
ELSEWHERE = (
    ("checkpoints.md", "mds_to_hf.py --mds_checkpoint .../mp_rank_00_model_states.pt",
     "tools/convert_hf.py import .../mp_rank_00_model_states.pt RUN --weights-only, and export RUN OUT",
     "checkpoint/test_reference.py::test_a_model_file_becomes_a_hugging_face_folder"),
    ("train_aGPT_7B_chain.sh", "a chain of N jobs", "python -m megatron.launch submit --chain N",
     "launch/test_submit.py::test_a_chain_on_pbs"),
    ("ALCF/test_alcf.sh", "bash ALCF/test_alcf.sh", "the same name: tools/test_dist.py and a short run",
     "tools/test_smoke_test.py::test_as_a_user_starts_it"),
    ("fused_stackcode, mix_datasets", "datasets merged and weighted",
     "tools/merge_datasets.py, tools/make_data_list.py",
     "tools/test_merge_datasets.py::test_sequences_and_documents_follow_one_another"),
    ("finetune_llama3", "a Hugging Face model, trained further on instructions",
     "the model by tools/convert_hf.py import; no chat data", ""),
)  # fmt: skip

_3B = "GRAD_ACC_STEPS=2 MICRO_BATCH=4 USE_ACTIVATION_CHECKPOINTING=1 ZERO_STAGE=0 "
_2B = ("GRAD_ACC_STEPS=2 MICRO_BATCH=1 USE_ACTIVATION_CHECKPOINTING=0 ZERO_STAGE=0"
       " LR_DECAY_STYLE=constant TOKENIZER_TYPE=HFTokenizer TOKENIZER_MODEL=google/gemma-7b"
       " DATA_FILE_LIST=ALCF/data-lists/aurora/")  # fmt: skip

_GEMMA = "parameters are counted with gemma's vocabulary, the default; VOCAB_SIZE=32000 gives the published 68,976,648,192"

COMMANDS: dict[str, Command] = {
    "llama3": Command("002:28-41", SMALL.format(arch="llama3-3B", layers=14)),
    "smollm3": Command("002:28-41", SMALL.format(arch="smollm3-3B", layers=18)),
    "brace": Command("002:29", SMALL.format(arch="{smollm3-3B,llama3-3B}", layers=14),
                     differs="the brace means a choice; the known names are listed"),
    "70B": Command("004:12-24", f"GAS=32; {PIPELINE_70B}", 8, f"SEQ_LEN is obeyed (the published rows were run at 4096: SEQ=4096); {_GEMMA}"),
    "42B": Command("004:91", TENSOR_42B, 8, "the same with VOCAB_SIZE=32000: 41,404,500,960"),
    "skip": Command("003:35", SKIP),
    "train_alcf": Command("README", "bash train_alcf.sh"),
    "3B": Command("AuroraGPT-3B.md", f"{_3B} MODEL_ARCH=3B OPT=ipex.fusedlamb bash train_alcf.sh",
                  128, "two models are meant by 3B; the reference took 7B"),
    "llama3-3B": Command("AuroraGPT-3B.md", f"{_3B} MODEL_ARCH=llama3-3B OPT=ipex.fusedlamb bash train_alcf.sh", 128, "lamb is torch's, with a note"),
    "2B": Command("train_aGPT_2B_large_batch.sh", f"MODEL_ARCH=AuroraGPT-2B OPT=sophiag LR=2.28e-5 {_2B}olmo-mix-1124.txt bash train_alcf.sh", 256),
    "2B stage 3": Command("train_aGPT_2B_sophiag_stage3.sh", f"MODEL_ARCH=AuroraGPT-2B TRAIN_TOKENS=7770766423379 OPT=sophiag LR=2.17e-5 {_2B}nvidia-math1-code2.txt bash train_alcf.sh", 256),
    "cooldown": Command("cooldown.md", """LR_DECAY_STYLE=constant OPT=ipex.fusedlamb OVERRIDE_CKPT_OPT_PARAM=1 TRAIN_ITERS=137650 \\
        GRAD_ACC_STEPS=2 LOAD=test_rollback DATA_FILE_LIST=ALCF/data-lists/aurora/dolmino-mix-1124-fused-file-list.txt \\
        bash train_alcf.sh --override-opt_param-scheduler --min-lr=2e-5 --lr_constant_plus_cooldown --lr_constant_plus_cooldown_frac=0.9""", 256, "the share is that which cools, as in the reference's program and not its notes: said in a note"),
    "cpt": Command("cpt.md", "DATA_FILE_LIST=./ALCF/data-lists/aurora/mix_lucid_papers_dolma.txt LOAD=/flare/checkpoints/old TRAIN_TOKENS=$((22*10**9)) GRAD_ACC_STEPS=16 LR=0.0002 LR_WARMUP_FRACTION=0.01 bash train_alcf.sh --universal-checkpoint --finetune", 2),
    "lr-finder": Command("large_batch_optimizers_settings.md", "DATA_FILE_LIST=./ALCF/data-lists/aurora/books.txt TRAIN_ITERS=1000 GRAD_ACC_STEPS=16 LR_DECAY_STYLE=constant LR=0.0002 LR_WARMUP_FRACTION=0.01 OPT=muon bash train_alcf.sh --lr_constant_plus_cooldown --init-method-std 0.01 --adjust-word-embedding-init --word-embedding-init-std 0.632 --lr-finder", 2),
    "deepspeed": Command("README", "LAUNCH_WITH=deepspeed bash train_alcf.sh", 2),
    "mpich": Command("helpers.sh", "LAUNCH_WITH=MPICH bash train_alcf.sh", 2),
}  # fmt: skip
