"""The command line: spellings, notes and refusals."""

import pytest

from megatron.config.reference_flags import ALWAYS
from tests.config.helpers import configured, refusal, resolved


def test_both_forms_of_a_value():
    assert configured("--num-layers", "6").model.num_layers == 6
    assert configured("--num-layers=6").model.num_layers == 6
    assert configured("--lr=1e-3", "--min-lr", "1e-4").optimizer.min_learning_rate == 1e-4


def test_bare_booleans():
    assert configured("--tie-embeddings", "--num-layers", "2").model.tie_embeddings
    assert not configured("--tie-embeddings=0", TIE_EMBEDDINGS=1).model.tie_embeddings
    assert configured("--dry-run").log.dry_run


def test_ranges_take_values_up_to_the_next_flag():
    run = configured("--train-range-to-skip", "10", "20", "25", "30", "--num-layers", "2")
    assert run.skip_ranges == ((10, 20), (25, 30)) and run.model.num_layers == 2
    assert configured("--train-range-to-skip=5-6").skip_ranges == ((5, 6),)


@pytest.mark.parametrize(
    ("flag", "read"),
    [
        ("--bf16", lambda run: run.train.dtype == "bf16"),
        ("--fp16", lambda run: run.train.dtype == "fp16"),
        ("--checkpoint-activations", lambda run: run.train.activation_checkpointing == "1"),
        ("--recompute-activations", lambda run: run.train.activation_checkpointing == "selective"),
        ("--recompute-granularity=full", lambda run: run.train.activation_checkpointing == "1"),
        ("--untie-embeddings-and-output-weights", lambda run: not run.model.tie_embeddings),
        ("--split=98.5,1,0.5", lambda run: run.data.train_split == 98.5),
        ("--rotary-position-embeddings-theta=10000", lambda run: run.model.rope_theta == 1e4),
    ],
)
def test_spellings_of_megatron(flag, read):
    assert read(configured(flag, TIE_EMBEDDINGS=1))


@pytest.mark.parametrize("flag", [*ALWAYS, "--normalization=rmsnorm", "--hidden-dropout=0"])
def test_what_is_always_so_is_noted(flag):
    assert any(note.startswith(flag.partition("=")[0]) for note in resolved(flag).notes)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-layer", "4"], ["--num-layer ", "--num-layers"]),
        (["--qqq"], ["--qqq", "--help"]),
        (["num-layers=4"], ["num-layers", "flags start with --"]),
        (["--num-layers"], ["--num-layers needs a value"]),
        (["--num-layers", "--lr", "1"], ["--num-layers needs a value"]),
        (["--bf16=1"], ["--bf16 takes no value"]),
        (["--normalization", "layernorm"], ["--normalization layernorm", "rmsnorm"]),
        (["--attention-dropout=0.1"], ["--attention-dropout 0.1", "--attention-dropout 0"]),
        (["--split", "1"], ["--split 1", "three"]),
        (["--lr", "1e-3", "--lr", "2e-3"], ["--lr=0.001", "--lr=2e-3"]),
        (["--lr-constant-tokens", "5"], ["--lr-constant-tokens", "--lr-constant-fraction"]),
        (["--fp16", "--bf16"], ["--fp16", "--bf16"]),
        (["--train-range-to-skip"], ["--train-range-to-skip needs values"]),
        (["--lr", "-1e-3"], ["--lr=-0.001", "above 0"]),
        (["--tie-embeddings", "0", "--nosuch", "5"], ["'0' is not a flag", "--nosuch is not"]),
    ],
)  # fmt: skip
def test_wrong_command_lines(argv, words):
    message = refusal(*argv)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


def test_a_printed_label_is_a_preset_with_its_numbers():
    run = configured(MODEL_ARCH="llama3-3B-nLayers14")
    assert run.model == configured(MODEL_ARCH="llama3-3B", NLAYERS=14).model
    assert run.label == "llama3-3B-nLayers14"
    more = configured("--model-arch", "debug-nLayers8-kv4-ffn64").model
    assert (more.num_layers, more.num_key_value_heads, more.ffn_hidden_size) == (8, 4, 64)
    assert configured("--num-layers", "3", MODEL_ARCH="smollm3-nLayers9").model.num_layers == 3
    assert "the label in MODEL_ARCH" in refusal(MODEL_ARCH="smollm3-nLayers9", NLAYERS=3)
    assert configured(MODEL_ARCH="smollm3-nLayers9", NLAYERS=9).model.num_layers == 9


def test_counts_are_read_as_they_are_written():
    assert configured(TRAIN_TOKENS="2M").train.train_tokens >= 2_000_000
    assert "write 1024 or 1000" in refusal(SEQ="1k")


def test_other_names_of_an_update_rule_are_taken_and_said():
    found = resolved(OPT="AdamW", LAUNCH_WITH="MPICH", LR_DECAY_STYLE="wsd", WANDB_MODE="off")
    assert found.run.optimizer.optimizer == "adamw" and not found.notes
    assert found.run.launch.launch_with == "mpiexec"
    assert found.run.optimizer.lr_decay_style == "warmup-stable-decay"
    (note,) = resolved(OPT="apex.adam").notes
    assert note.startswith("OPT=apex.adam is trained with adamw")
    assert "Did you mean cosine" in refusal(LR_DECAY_STYLE="cosin")
