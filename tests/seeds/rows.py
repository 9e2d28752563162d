"""The concrete things in the five seeds, one a line: what holds here, and the test that shows it.

A line is `seed:lines | what it shows | verdict | what is here | test`. Verdicts: works; on purpose
(differs, and why); not yet; machine (needs the machine itself). A test is a file under tests/ and a
function in it.
"""

from __future__ import annotations

from typing import NamedTuple

WORKS, ON_PURPOSE, NOT_YET, MACHINE = "works", "on purpose", "not yet", "machine"
VERDICTS = (WORKS, ON_PURPOSE, NOT_YET, MACHINE)


class Row(NamedTuple):
    """One thing that a seed shows."""

    line: str
    shows: str
    verdict: str
    here: str
    test: str


TEXT = """
002:28-41 | the variables of the command | works | all taken; ZERO_STAGE=0 is run as 1, said in a note | seeds/test_commands.py::test_sizes_and_batch_of_the_small_models
002:29 | `MODEL_ARCH={smollm3-3B,llama3-3B}` literally | on purpose | refused: the brace stands for a choice; the names are listed | seeds/test_commands.py::test_what_is_refused_on_purpose
002:30 | a sweep over NLAYERS | works | `tools/sweep.py NLAYERS=4,6,8`, or a loop in bash; the folder's name holds NLAYERS | tools/test_sweep_tool.py::test_every_row_has_its_status_and_the_sweep_goes_on
002:39 | `$(ezpz_get_machine_name)` | works | after `source ALCF/helpers.sh` | launch/test_helpers.py::test_a_sourced_shell_knows_its_job_and_keeps_its_options
002:39 | the machine's books.txt | works | tools/import_data_lists.py copies a machine's lists from a checkout of the reference | tools/test_import_data_lists.py::test_all_lists_are_copied_byte_for_byte_and_told_about
002:37-38 | HFTokenizer google/gemma-7b | works | 256,000 known by name; a run downloads it | seeds/test_commands.py::test_sizes_and_batch_of_the_small_models
002:7-20 | sizes of 12 models | works | 12 of 12 exact | seeds/test_commands.py::test_sizes_and_batch_of_the_small_models
002:7-20 | tokens/s a GPU and TFLOPS | works | in each log line, by the published formula within 0.5% | model/test_architecture.py::test_small_models
002:7-20 | those figures on Aurora | machine | |
002:22 | out of memory at 16 and 20 layers | on purpose | they fit: the loss keeps no copies of the logits, with which the edges are the published ones; a verdict is printed | plan/test_memory.py::test_the_edges_of_the_reference_by_its_own_formula
002:44-68 | blocks of the two architectures | works | the ARCHITECTURE box has the keys | seeds/test_commands.py::test_blocks_of_the_documents
002:3 | a W&B report page | works | report.html of one run or of several, `python3 tools/report.py RUN...` | analysis/test_report_page.py::test_several_runs_are_side_by_side
002:74-91 | legend by machine, NHOSTS, label, GBS | works | in the W&B config: machine, hosts, created_at, `env.MODEL_ARCH` (the label), `env.NHOSTS` | training/test_dashboards.py::test_offline_wandb_is_read_back_and_resumes_under_its_id
002:93-117 | tokens/s a GPU and global | works | both from the global count | training/test_meter.py::test_per_device_rates_are_the_global_ones_divided
002:98 | a row with GBS 96 | works | GRAD_ACC_STEPS=4 | seeds/test_commands.py::test_a_row_with_twice_the_batch
002:119-128 | corrections by /24 | works | not needed: rates are derived once | training/test_meter.py::test_per_device_rates_are_the_global_ones_divided
002:130-151 | the size as a number in W&B | works | `throughput/approx_params_in_billions` | training/test_events.py::test_a_step_has_the_reference_names_with_true_units
002:77-91 | mean over a run beside its last value | works | report.md and compare_runs sum over the steps | analysis/test_summary.py::test_rates_are_tokens_over_seconds_not_means_of_rates
004:4 | TOTAL_PARAMS=68976648192 | works | exact with VOCAB_SIZE=32000; the default tokenizer is gemma's | seeds/test_commands.py::test_rows_of_the_70b_study
004:12-24 | the command, with NHOSTS of the job | works | PP 8, DP 12, GBS by GAS | seeds/test_commands.py::test_rows_of_the_70b_study
004:12 | the same without ezpz | works | `source ALCF/helpers.sh` exports NHOSTS | launch/test_helpers.py::test_a_sourced_shell_knows_its_job_and_keeps_its_options
004:21 | SEQ_LEN=8192 | on purpose | obeyed; the published rows were run at 4096: SEQ=4096 gives them | seeds/test_commands.py::test_rows_of_the_70b_study
004:22 | the books list | works | as 002:39; a list that is not there is named with the command that copies it | tools/test_import_data_lists.py::test_a_missing_list_of_a_machine_names_the_command
004:32-47 | DP and GBS of 13 rows | works | all as listed | seeds/test_commands.py::test_rows_of_the_70b_study
004:34,47 | two rows out of memory | on purpose | 16 hosts fit; 8 hosts with TP=1 do by less than 1 GiB a device; a verdict is printed | plan/test_fit.py::test_published_layouts_of_the_70b_fit
004:32-47 | TFLOPS, samples/s, tokens/s a GPU | works | the formula gives the published figures | seeds/test_commands.py::test_rows_of_the_70b_study
004:32-61 | a table of many runs with links, OOM and hung rows in it | works | `tools/compare_runs.py runs --format html` | analysis/test_comparing.py::test_a_row_out_of_memory_stays_in_the_table
004:34-61 | a W&B run for each row | works | a row has a folder, and so a W&B run, of its own: by its name, or refused with the RUN_NAME to set | e2e/test_sweep.py::test_rows_of_a_sweep
004:66-79 | ZeRO-3 with hpZ on 4 to 16 hosts | works | DP and GBS as listed | seeds/test_commands.py::test_rows_of_zero_3_with_hpz
004:81 | a hang on 4 nodes | works | the rank is named, status 124, RETRIES starts again | launch/test_hang.py::test_a_silent_rank_is_named_though_others_tick
004:88-91 | frameworks-2025.0.0 on x4515c6s0b0n0 | machine | the host is known as Aurora's |
004:91 | 42B, TP=6, integers by the shell | works | all 14 lines of its block | seeds/test_commands.py::test_blocks_of_the_documents
004:91 | the same on a laptop | on purpose | 6 ranks, on the debug preset's length and batch | seeds/test_commands.py::test_every_command_resolves_everywhere
004:94-111 | the ARCHITECTURE box | works | same header and keys, fixed order, five more | seeds/test_commands.py::test_blocks_of_the_documents
004:113-117 | GAS 1, 2, 4 | works | GBS 16, 32, 64 | seeds/test_commands.py::test_rows_of_the_42b_study
004:119-133 | 32 nodes, PP 16 | works | DP 24, GBS 384 | seeds/test_commands.py::test_rows_on_32_hosts
004:135-147 | MiCS on 4, 8, 16 nodes | works | MICS_SHARD_SIZE=48 | seeds/test_commands.py::test_rows_of_mics
004:123-147 | FLOPs with recompute counted | works | [LM] and [DS] in each line, causal in the metrics | model/test_architecture.py::test_log_with_checkpointing
003:35 | `PBS_O_WORKDIR=$(pwd) bash train_aGPT_7B.sh --train-range-to-skip 10 20 25 30` | works | the old name is kept | seeds/test_commands.py::test_the_spike_skipper
003:35 | the same with train_alcf.sh | works | `10-20,25-30`, 17 steps, samples and tokens | seeds/test_commands.py::test_the_spike_skipper
003:47 | an even number of steps | works | refused with the arithmetic | seeds/test_commands.py::test_the_spike_skipper
003:69-79 | draw a batch and drop it | on purpose | not read: the samples of a step follow from its number | e2e/test_skip.py::test_other_steps_see_the_same_tokens
003:81-88 | counters and schedule advance | works | also over a resume | e2e/test_skip.py::test_counters_and_rate_advance
003:96-135 | proof by printed tokens | works | DUMP_TOKENS, DUMP_SKIPPED_ITERS; numbered from 1, as in the log | e2e/test_skip.py::test_dumped_tokens_of_a_skipped_step_are_those_it_would_have_seen
003:191 | the log line | works | field by field | training/test_events.py::test_a_step_is_the_published_line
003:191 | 635,782 steps, GBS 768, three rates | works | exactly these | seeds/test_commands.py::test_the_length_of_the_published_run
003:192 | memory after the first step | works | allocated and reserved, now and at most, in MiB | training/test_first_step.py::test_the_allocators_four_numbers_on_an_accelerator
003:193-195 | (min, max) time across ranks | works | TIMING_LOG_LEVEL=1: six phases, in the log and every tracker | engine/test_phases.py::test_layout
003:204 | lazy building of data sets | on purpose | there is no index to build | data/test_dataset.py::test_random_access_in_any_order_equals_sequential
003:243 | lines of the FLOPs profiler | on purpose | FLOPs are counted from the shape | model/test_architecture.py::test_log_with_checkpointing
003:462 | a skipped step at 5,620 TFLOPS | on purpose | a skipped step has no rate and no loss | training/test_events.py::test_a_skipped_step_has_no_rate_and_no_loss
003:463 | `Caught 3 in 'ranges_to_skip'` | works | `iteration 3 is in --train-range-to-skip: skipped` | e2e/test_skip.py::test_counters_and_rate_advance
003:21 | a spike in the loss, found | works | found as it happens, with the suspects; marked in report.html; SPIKE_POLICY acts | training/test_events.py::test_a_spike_and_what_was_done
003:101-133 | tokens of Llama-2 | on purpose | Llama2Tokenizer reads the file that TOKENIZER_MODEL names; the file has a licence of its own and is not shipped | data/prepare/test_tokenizer.py::test_fingerprints_tell_tokenizers_apart_and_know_copies
000:7-35 | a table of 24 rows of two runs | works | `tools/compare_runs.py A B`: all of them, from raw sums; tokens/s is that of all devices | analysis/test_comparing.py::test_the_published_figures_follow_from_their_raw_sums
000:39-74 | the Llama-3.2-1B shape | works | exact, exported with its config.json | model/test_architecture.py::test_parameters_of_presets
000:78-86 | identities of samples and tokens a step | works | checked by compare_runs, which finds that the published tokens/s are of one device | analysis/test_comparing.py::test_tokens_of_one_device_as_tokens_of_all_are_found
000:90-124 | ratios of step times | works | 1.37 times the steps/s, 0.46 of them by device | analysis/test_comparing.py::test_the_published_ratios
000:126-142 | a sweep over devices | works | `tools/sweep.py NGPU_PER_HOST=1,2,4` | tools/test_sweep_tool.py::test_every_row_has_its_status_and_the_sweep_goes_on
000:151 | a checkpoint as a Hugging Face folder | works | EXPORT_HF=1 or tools/convert_hf.py | equivalence/test_huggingface.py::test_export
000:151 | a checkpoint of the reference | works | tools/convert_hf.py, or LOAD with FINETUNE | checkpoint/test_reference.py::test_every_tensor_and_state_is_taken
000:151 | `ezpz launch ...` | works | `launch` after `source ALCF/helpers.sh`, or `python -m megatron.launch` | launch/test_helpers.py::test_a_sourced_shell_knows_its_job_and_keeps_its_options
000:151 | `-m ezpz.examples.hf_trainer` | works | `tools/hf_trainer.py` with the same arguments | tools/test_hf_trainer.py::test_the_published_command_is_taken
000:151 | streaming of a Hub data set | works | DATA=hub:NAME, or `--input hub:NAME` of tools/preprocess_data.py: streamed into tokens once, then trained on | data/prepare/test_hub.py::test_rows_are_streamed_into_units
000:151 | block size, bf16, recompute, 100 steps | works | SEQ, DTYPE, USE_ACTIVATION_CHECKPOINTING, ZERO_STAGE=3 for FSDP | seeds/test_commands.py::test_settings_of_the_trainer
000:216 | rate linear from 5e-5 to 0 | works | LR_DECAY_STYLE=linear LR_WARMUP_FRAC=0 | seeds/test_commands.py::test_settings_of_the_trainer
000:154-201 | job, hosts and command in the log | works | folder, set variables, launch command; job and hosts in run.json | seeds/test_commands.py::test_launch_lines_of_the_documents
000:160 | the mpiexec line of Aurora | works | the published binding by CPU_BIND; today's cores by default | seeds/test_commands.py::test_launch_lines_of_the_documents
000:270 | the mpiexec line of Polaris | works | `--np=8 --ppn=4 --cpu-bind=depth --depth=8` | seeds/test_commands.py::test_launch_lines_of_the_documents
000:157 | the host file of PBS | works | PBS_NODEFILE, else the server's | launch/test_site.py::test_pbs_without_node_file_variable_uses_the_servers
000:196-199 | filters of Aurora's output | on purpose | ezpz has dropped them too |
000:202-203 | the W&B run's address | works | in the log, wandb/run_url and report.md | training/test_dashboards.py::test_the_runs_address_and_hosts_are_kept
000:205-212 | examples, batch, steps, parameters | works | the box and the epochs of each corpus | plan/test_report.py::test_dry_run_holds_everything
000:204 | tokenizer's ids in the model's config | works | files and ids survive training and export | checkpoint/test_huggingface_files.py::test_files_and_ids_survive_training
000:214-217 | a progress bar | works | a line each 30 s with progress and time left | training/test_loggers.py::test_the_console_prints_lines_and_now_and_then_the_time_left
000:216 | loss, norm, rate, tokens of each step | works | metrics.jsonl | training/test_meter.py::test_a_step_record_has_the_contracted_fields
000:219,222 | a Hugging Face folder at each save | works | EXPORT_HF=1 | checkpoint/test_huggingface_files.py::test_each_save_is_exported_behind_the_steps
000:223-232 | runtime, rates, total FLOPs | works | report.md | analysis/test_run_report.py::test_the_report_tells_what_happened
000:237-246 | loss, perplexity, accuracy, runtime, samples/s of an evaluation | works | in the log and in metrics.jsonl; tools/evaluate.py gives them for a checkpoint | e2e/test_looks.py::test_every_layout_sees_the_same
000:146-261 | one command on two machines | works | by host name | seeds/test_commands.py::test_every_command_resolves_everywhere
000:247-249 | where W&B keeps its files | works | wandb in the run's folder | training/test_dashboards.py::test_offline_wandb_is_read_back_and_resumes_under_its_id
000:147-150,258-260 | a venv on top of a module | works | made where the module lacks DeepSpeed | launch/test_helpers.py::test_an_environment_lies_on_top_of_the_machines_python
001:113-129 | backends; a missing rank hangs the rest | works | nccl, xccl, gloo; the silent rank is named, 124 | launch/test_hang.py::test_a_silent_rank_is_named_though_others_tick
001:131-191 | collectives, one by one | works | tools/test_dist.py checks eight on every rank | tools/test_smoke_test.py::test_all_are_right
001:195-204 | GBS = micro x N; rate by sqrt(N) | works | the arithmetic is checked; the rate is yours | seeds/test_commands.py::test_a_row_with_twice_the_batch
001:219-231 | other data for each worker | works | by construction | data/test_dataset.py::test_every_sample_once_an_epoch
001:233-254 | the same weights everywhere | works | drawn by seed and name | parallel/test_init.py::test_numbers_depend_on_seed_and_name_and_block_only
001:256-292 | parallel input and prefetch | works | a thread reads ahead | data/test_dataset.py::test_the_pool_stays_bounded_and_order_does_not_depend_on_it
001:304-335 | ZeRO 1-3, offload | works | equal to one process | equivalence/test_zero_layouts.py::test_layout
001:320-335 | FSDP | on purpose | ZeRO-3 shards the same | equivalence/test_zero_layouts.py::test_layout
001:337-485 | TP, PP, 3D | works | equal to one process | equivalence/test_layouts.py::test_layout
001:491-501 | NVMe offload, tiled layers | on purpose | not offered: CPU_OPTIMIZER keeps states on the host, TP divides a layer; the flag of tiled layers says so | launch/test_reference_flags.py::test_what_is_refused_says_what_to_do
001:487-549 | which strategy when | works | docs/parallelism.md; a dry run prints the cheapest change that fits | plan/test_fit.py::test_the_cheapest_is_the_first_that_fits
001:604-664 | fine-tuning on instructions | on purpose | pretraining only: no chats, no loss masked over a prompt, no adapters; a model is imported, trained on, and exported to libraries that have them | equivalence/test_huggingface.py::test_an_imported_model_is_exported_after_training
001:676-684 | generating text | works | `python3 tools/generate.py RUN --prompt "..."`, and a sample at the end of a run | training/test_saved_model.py::test_greedy_texts_are_those_of_transformers
001:706-715,790-801 | clone, `pip install -e .` | works | setup.py with extras | structure/test_shell.py::test_requirements_are_pinned
001:720,748-786 | `source utils.sh`, `ezpz_setup_job`, `launch` | works | `source ALCF/helpers.sh` gives the names | launch/test_helpers.py::test_a_sourced_shell_knows_its_job_and_keeps_its_options
001:723-743 | `ezpz_setup_python` | works | modules, then .venv on top of what they have | launch/test_helpers.py::test_an_environment_lies_on_top_of_the_machines_python
001:806 | `unset NCCL_NET ...` | works | not needed: no such variable is set unless asked for | launch/test_network_plugin.py::test_nothing_is_set_that_was_not_asked_for
001:814-992 | `python3 -m ezpz.test_dist` | works | `launch python3 tools/test_dist.py` | tools/test_smoke_test.py::test_as_a_user_starts_it
001:847-859 | the W&B project of a script, hosts in its config | works | WANDB_PROJECT; `hosts` | training/test_dashboards.py::test_the_runs_address_and_hosts_are_kept
001:818-820 | LOG_FROM_ALL_RANKS=1 | works | every rank logs, with its rank | training/test_log.py::test_every_rank_logs_where_it_is_asked_to
001:994-1143 | terminal plots of 6 metrics | works | the loss at the end, any metric by tools/plot.py --metric | tools/test_plot_command.py::test_a_run_is_drawn
001:1146-1190 | a profile | works | PROFILE=pyinstrument, PYINSTRUMENT_PROFILER=1: html and text; PROFILE=torch: a trace | training/test_profiles.py::test_a_call_tree_as_html_and_text
001:1217-1225 | characters of Shakespeare | works | tools/preprocess_data.py with CharTokenizer | data/prepare/test_preprocess.py::test_characters_make_their_own_alphabet
001:1231-1241 | `launch python3 -m wordplay ...` | works | MODEL_ARCH=shakespeare: GPT-2's blocks, any size by NLAYERS, HEADS, HIDDEN, SEQ; docs/hands-on.md | seeds/test_commands.py::test_the_hands_on_sizes
001:1285-1336 | the configuration as JSON | works | run.json, with where each value came from | plan/test_report.py::test_dry_run_holds_everything
001:1339-1342 | decayed and other tensors counted | works | of rank 0's part, in the log | training/optimizers/test_rules.py::test_vectors_are_not_decayed_and_empty_groups_are_left_out
001:1348-1428 | the model printed | works | DEBUG=1 | engine/test_engine.py::test_the_model_is_printed_where_it_is_asked_for
001:1429 | start-up time | works | in the log | training/test_first_step.py::test_start_up_time_by_part
001:1430-1447 | a legend of the line | works | docs/log.md | display/test_legend.py::test_a_key_and_its_field_are_explained
001:1448-1526 | a sample at each evaluation | works | `SAMPLE_PROMPT="What is an LLM?"`, in every layout | e2e/test_looks.py::test_every_layout_sees_the_same
001:1451 | forward and backward times, mfu | works | TIMING_LOG_LEVEL=1 (forward, backward); mfu in the metrics | engine/test_phases.py::test_layout
001:1470-1471 | the best checkpoint is kept | works | KEEP_BEST | checkpoint/test_retention.py::test_what_is_kept
001:1451-1533 | losses on 4 A100 | machine | |
001:1241 | `tee log` | works | output.log in the run's folder | launch/test_train_script.py::test_the_trainings_status_is_the_scripts
001:91-1536 | 29 pictures | works | docs/pictures: six, computed by `python3 -m tests.pictures.draw` | pictures/test_pictures.py::test_a_drawing_is_the_committed_one_and_asks_for_nothing
"""


def rows() -> list[Row]:
    """The lines of TEXT, in order."""
    return [Row(*(cell.strip() for cell in line.split(" |"))) for line in TEXT.strip().splitlines()]
