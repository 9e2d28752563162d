"""Precedence, aliases, derived values and the published commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config import presets, schema
from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from tests.config.helpers import AURORA, configured, refusal, resolved

ROOT = Path(__file__).parents[2]


def test_nothing_set_on_a_laptop():
    run = resolve({}, [], Site()).run
    assert (run.label, run.train.train_iters, run.parallel.world_size) == ("debug", 200, 1)
    assert (run.data.data_file_list, run.data.tokenizer_type) == ("builtin", "BuiltinTokenizer")
    assert run.model.vocab_size == 4096 and run.parameters < 2_000_000
    assert str(run.checkpoint_folder) == "runs/debug-seq128-builtin/checkpoints"


def test_nothing_set_on_a_known_machine():
    run = configured(site=AURORA)
    assert (run.label, run.parallel.world_size, run.model.vocab_size) == (
        "AuroraGPT-7B",
        24,
        256000,
    )
    assert run.data.data_file_list == "ALCF/data-lists/aurora/dolma.txt"
    assert (run.train.global_batch_size, run.train.dtype) == (24 * 16, "bf16")
    assert run.train.train_tokens == 4_673_780_159_710
    assert run.train.train_iters == 4_673_780_159_710 // (24 * 16 * 4096)
    assert run.run_folder.name == "AuroraGPT-7B-seq4096-dolma"


def test_debug_on_a_known_machine_stays_short():
    assert configured(site=AURORA, MODEL_ARCH="debug").train.train_iters == 200


def test_precedence():
    site = Site("there", True, 1, 1, {"MICRO_BATCH": "5", "LR": "5e-4", "TP": "2"})
    base = resolved(site=site, MODEL_ARCH="33B", WORLD_SIZE=6)
    assert base.run.parallel.tensor_parallel == 6  # preset over machine
    assert base.run.train.micro_batch_size == 1
    assert base.run.optimizer.learning_rate == 5e-4  # machine over default
    assert base.sources["optimizer.learning_rate"] == "machine there"
    variable = resolved(site=site, MODEL_ARCH="33B", MICRO_BATCH=3, WORLD_SIZE=6)
    assert variable.run.train.micro_batch_size == 3  # variable over preset
    flag = resolved(
        "--micro-batch-size", "4", site=site, MODEL_ARCH="33B", MICRO_BATCH=3, WORLD_SIZE=6
    )
    assert flag.run.train.micro_batch_size == 4  # flag over variable
    assert flag.sources["train.micro_batch_size"] == "--micro-batch-size"


def test_an_empty_variable_is_unset():
    assert configured(NLAYERS="", MODEL_ARCH=" ", DTYPE="").model.num_layers == 4


@pytest.mark.parametrize(
    "option",
    [o for o in schema.options() if o.kind == "int" and len(o.env) > 1],
    ids=lambda o: o.key,
)
def test_every_alias_of_a_number(option):
    section, _, field = option.key.partition(".")
    for name in option.env:
        assert getattr(getattr(configured(**{name: 8}), section), field) == 8


def test_aliases_of_words():
    assert configured(OPTIM="sgd").optimizer.optimizer == "sgd"
    assert configured(LR_WARMUP_FRACTION=0.1).optimizer.lr_warmup_fraction == 0.1
    assert configured(WB_PROJECT="other").log.wandb_project == "other"
    assert configured(SAVE="somewhere").checkpoint_folder.name == "somewhere"


def test_every_preset_resolves_under_every_spelling():
    for key, preset in presets.PRESETS.items():
        any_case = () if key.lower() == "smollm3-3b" else (key.upper(), key.lower())
        for name in (key, *any_case, *preset.also):
            assert configured(MODEL_ARCH=name, VOCAB_SIZE=32000).model.model_arch == key


@pytest.mark.parametrize("name", ["SMOLLM3-3B", "smollm3-3b", "Smollm3-3b"])
def test_a_name_that_may_mean_two_models_is_refused_with_both(name):
    message = refusal(MODEL_ARCH=name)
    assert f"MODEL_ARCH={name} may mean two models" in message
    assert "MODEL_ARCH=SmolLM3-3B (the Hugging Face Hub's: tied" in message
    assert "MODEL_ARCH=smollm3-3B (AuroraGPT's: untied" in message


@pytest.mark.parametrize(
    ("name", "other"), [("SmolLM3-3B", "smollm3-3B"), ("llama3-3B", "Llama-3.2-3B")]
)
def test_which_of_two_models_is_trained_is_said(name, other):
    for this, that in ((name, other), (other, name)):
        notes = resolved(MODEL_ARCH=this, VOCAB_SIZE=32000).notes
        assert any(f"MODEL_ARCH={this} is " in note and f"{that} is " in note for note in notes)


@pytest.mark.parametrize(
    ("arch", "layers", "label"),
    [
        ("llama-3b", 6, "llama3-3B-nLayers6"),
        ("smollm3_3B", None, "smollm3-nLayers36"),
        ("phi4_mini", None, "phi4-mini-nLayers24"),
        ("aurora_gpt_2b", None, "AuroraGPT-2B"),
        ("33B", None, "AuroraGPT-33B"),
        ("70b", None, "AuroraGPT-70B"),
        ("smollm2-135m", None, "SmolLM2-135M"),
        ("debug", 8, "debug-nLayers8"),
    ],
)
def test_labels(arch, layers, label):
    assert configured(MODEL_ARCH=arch, VOCAB_SIZE=32000, NLAYERS=layers or "").label == label


WIDE = {"HIDDEN": 8192, "HEADS": 64, "NLAYERS": 80, "NUM_KV_HEAD": 8}


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"MODEL_ARCH": "7B", **WIDE, "FFN_HIDDEN_SIZE": 28672}, "AuroraGPT-70B"),
        (
            {"MODEL_ARCH": "7B", **WIDE, "FFN_HIDDEN_SIZE": 1024},
            "llama-nLayers80-hidden8192-heads64-kv8-ffn1024",
        ),
        ({"MODEL_ARCH": "7B", "NLAYERS": 3}, "AuroraGPT-7B-nLayers3"),
        ({"MODEL_ARCH": "llama3-3B", "TIE_EMBEDDINGS": 1}, "llama3-3B-nLayers28-tied"),
        ({"MODEL_ARCH": "SmolLM3-3B", "NOPE_INTERVAL": 0}, "SmolLM3-3B-nopeOff"),
        ({"HIDDEN": 256, "NUM_KV_HEAD": 4}, "debug-hidden256-kv4"),
        ({"ARCHITECTURE": "qwen3", "HEAD_DIM": 64}, "debug-headDim64-qwen3"),
    ],
)
def test_a_label_holds_the_model_that_is_trained(settings, label):
    run = configured(VOCAB_SIZE=32000, **settings)
    assert run.label == label
    assert run.checkpoint.run_name.startswith(f"{label}-seq")


def test_presets_are_overridable_in_every_field():
    for name in presets.PRESETS:
        run = configured(
            MODEL_ARCH=name, NLAYERS=4, HIDDEN=64, HEADS=4, NUM_KV_HEAD=2, FFN_HIDDEN_SIZE=32,
            SEQ=16, TIE_EMBEDDINGS=1, NOPE_INTERVAL=4, ROPE_THETA=1e4, ROPE_SCALING="llama3",
            VOCAB_SIZE=99, TP=1, ARCHITECTURE="llama", HEAD_DIM=32,
        ).model  # fmt: skip
        assert (run.num_layers, run.hidden_size, run.num_attention_heads) == (4, 64, 4)
        assert (run.num_key_value_heads, run.ffn_hidden_size, run.seq_length) == (2, 32, 16)
        assert (run.tie_embeddings, run.nope_interval, run.rope_theta) == (True, 4, 1e4)
        assert (run.rope_scaling, run.vocab_size) == ("llama3:8,1,4,8192", 99)
        assert (run.architecture, run.head_width) == ("llama", 32)


def test_published_70b_command():
    run = configured(
        PP=8, TP=2, HEADS=64, NLAYERS=80, NUM_KV_HEAD=8, FFN_HIDDEN_SIZE=28672, HIDDEN=8192,
        MICRO_BATCH=1, GRAD_ACC_STEPS=4, SEQ_LEN=8192, USE_ACTIVATION_CHECKPOINTING=1,
        DATA_FILE_LIST="ALCF/data-lists/aurora/books.txt", VOCAB_SIZE=32000,
        site=Site("aurora", True, 8, 12),
    )  # fmt: skip
    assert run.parameters == 68_976_648_192
    assert (run.data_parallel, run.train.global_batch_size, run.model.seq_length) == (6, 24, 8192)
    assert run.train.activation_checkpointing == "1"


def test_published_42b_command():
    run = configured(
        TP=6, PP=1, HEADS=48, NLAYERS=48, NUM_KV_HEAD=6, FFN_HIDDEN_SIZE=28668, HIDDEN=8160,
        ZERO_STAGE=2, MICRO_BATCH=1, GRAD_ACC_STEPS=1, DATA_FILE_LIST="books.txt", VOCAB_SIZE=32000,
        site=Site("aurora", True, 8, 12),
    )  # fmt: skip
    assert (run.data_parallel, run.train.global_batch_size) == (16, 16)


def test_tokenizer_and_vocabulary():
    hub = configured(MODEL_ARCH="Llama-3.2-1B", DATA_FILE_LIST="list.txt")
    assert (hub.data.tokenizer_model, hub.model.vocab_size) == ("meta-llama/Llama-3.2-1B", 128256)
    chosen = configured(
        MODEL_ARCH="Llama-3.2-1B", DATA_FILE_LIST="list.txt", TOKENIZER_MODEL="gpt2"
    )
    assert (chosen.model.vocab_size, chosen.padded_vocab_size) == (50257, 50304)
    kind = configured(DATA_FILE_LIST="list.txt", TOKENIZER_TYPE="ByteTokenizer")
    assert (kind.data.tokenizer_model, kind.model.vocab_size) == (None, 257)
    assert configured(TOKENIZER_TYPE="ByteTokenizer", VOCAB_SIZE=300).model.vocab_size == 300


def test_builtin_corpus_with_another_tokenizer_is_refused_in_a_real_run():
    assert "TOKENIZER_TYPE" in refusal(TOKENIZER_TYPE="ByteTokenizer")


def test_world_size():
    assert configured(TP=2, PP=2, NLAYERS=4).parallel.world_size == 4
    assert configured(NHOSTS=8, NGPU_PER_HOST=12).parallel.world_size == 96
    assert configured(site=Site("box", False, 1, 4)).parallel.world_size == 4
    assert configured(WORLD_SIZE=8, TP=2).data_parallel == 4
    assert "WORLD_SIZE=5" in refusal(site=Site("box", False, 1, 4), WORLD_SIZE=5)


def test_derived_values():
    run = configured(HIDDEN=4096, HEADS=32, NUM_KV_HEAD=8, TRAIN_ITERS=77)
    assert run.model.init_method_std == pytest.approx(0.009882, abs=1e-6)
    assert run.optimizer.lr_decay_iters == 77
    assert configured(LR_DECAY_ITERS=50).optimizer.lr_decay_iters == 50


def test_folders():
    run = configured(RUN_DIR="/tmp/here", LOAD="/tmp/there")
    assert (str(run.run_folder), str(run.load_folder)) == ("/tmp/here", "/tmp/there")
    assert str(run.checkpoint_folder) == "/tmp/here/checkpoints"
    named = configured(RUN_NAME="mine")
    assert named.load_folder == named.checkpoint_folder
    assert str(named.run_folder) == "runs/mine"


def test_zero_stage_0_is_noted_once():
    notes = resolved(ZERO_STAGE=0).notes
    assert len([note for note in notes if "ZERO_STAGE=0" in note]) == 1
    assert not resolved(ZERO_STAGE=1).notes


def test_skip_ranges_are_kept_merged():
    run = configured("--train-range-to-skip", "10", "20", "15", "30")
    assert run.skip_ranges == ((10, 30),) and run.data.train_range_to_skip == "10-30"
    late = resolved(TRAIN_RANGE_TO_SKIP="190-300")
    assert any("190-300" in warning for warning in late.warnings)


def test_rope_scaling_factors():
    scaling = configured(MODEL_ARCH="Llama-3.2-1B").model.rope_scaling_factors
    assert scaling == (32.0, 1.0, 4.0, 8192)
    assert configured().model.rope_scaling_factors is None


def test_json_round_trip():
    run = configured("--train-range-to-skip", "3", "4", MODEL_ARCH="Llama-3.1-8B", TRAIN_SPLIT=98.5)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_nothing_heavy_is_imported_and_it_is_fast():
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "sum(i * i for i in range(1_000_000))\n"
        "yardstick = time.process_time() - start\n"
        "start = time.process_time()\n"
        "from megatron.config.resolve import resolve; from megatron.config.resolve import Site\n"
        "from megatron.plan.report import dry_run_text\n"
        "dry_run_text(resolve({'DRY_RUN': '1'}, [], Site()), '')\n"
        "print((time.process_time() - start) / yardstick)\n"
        "ours = [n for n in sys.modules if '.' not in n and n != 'megatron']\n"
        "ours = [n for n in ours if not n.startswith('_')]\n"
        "print(sorted(set(ours) - set(sys.stdlib_module_names)))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for _ in range(3)
    ]
    # Of the time of a million squares, whatever the machine: 1.6 to 2.2 of it, 0.08 to 0.2 s.
    ratios, modules = zip(*(run.stdout.split("\n", 1) for run in runs), strict=True)
    assert min(map(float, ratios)) < 3
    assert modules[0].strip() == "[]"


@pytest.mark.parametrize("kind", ["0", "selective"])
def test_layers_of_a_recomputation_that_is_not_there_are_warned_of(kind):
    warnings = resolved(ACT_CKPT_NUM_LAYERS=2, USE_ACTIVATION_CHECKPOINTING=kind).warnings
    assert any("ACT_CKPT_NUM_LAYERS=2 has no effect" in warning for warning in warnings)
    assert not resolved(ACT_CKPT_NUM_LAYERS=2, USE_ACTIVATION_CHECKPOINTING=1).warnings
