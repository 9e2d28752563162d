"""Commands of the pages that no sandbox runs as they stand, and the test that runs them.

A command begins with the words of a line; below it stands the test. The longest match counts.
"""

from __future__ import annotations

TEXT = """
bash tools/gpu_check.sh
    tools/test_benchmark.py::test_the_rehearsal_for_a_gpu
source ALCF/helpers.sh
    launch/test_helpers.py::test_a_sourced_shell_knows_its_job_and_keeps_its_options
launch python3 tools/test_dist.py
    launch/test_helpers.py::test_launch_works_anywhere_on_a_laptop
python3 -m megatron.launch -n
    tools/test_smoke_test.py::test_as_a_user_starts_it
python3 -m megatron.launch env
    launch/test_helpers.py::test_a_sourced_shell_knows_its_job_and_keeps_its_options
python3 -m megatron.launch submit
    launch/test_submit.py::test_a_chain_on_pbs
python3 tools/benchmark.py
    tools/test_benchmark.py::test_the_table_of_a_step
python3 tools/check_data.py
    tools/test_check_data.py::test_good_data
python3 tools/compare_runs.py
    e2e/test_front_door.py::test_layouts_are_equal_and_said_to_be
python3 tools/convert_hf.py export
    equivalence/test_huggingface.py::test_export
python3 tools/convert_hf.py import
    equivalence/test_huggingface.py::test_import_follows_a_plain_loop
python3 tools/convert_hf.py import CKPT_DIR
    equivalence/test_reference.py::test_it_goes_on_as_a_plain_loop
python3 tools/doctor.py
    tools/test_doctor.py::test_a_laptop_is_well
python3 tools/import_data_lists.py
    tools/test_import_data_lists.py::test_all_lists_are_copied_byte_for_byte_and_told_about
python3 tools/inspect_batch.py
    tools/test_inspect_batch.py::test_a_step_is_what_the_run_read
python3 tools/inspect_batch.py --run RUN --find-document
    tools/test_inspect_batch.py::test_a_document_is_found_wherever_it_was_read
python3 tools/inspect_batch.py --run RUN --step 120 --loss
    tools/test_inspect_batch.py::test_losses_of_samples_and_corpora
python3 tools/make_data_list.py
    tools/test_make_data_list.py::test_weights
python3 tools/mend_index.py
    tools/test_mend_index.py::test_three_documents
python3 tools/merge_datasets.py
    tools/test_merge_datasets.py::test_sequences_and_documents_follow_one_another
python3 tools/plot.py
    tools/test_plot_command.py::test_a_run_is_drawn
python3 tools/prepare_cache.py
    tools/test_prepare_cache.py::test_a_run_finds_everything
python3 tools/preprocess_data.py
    data/prepare/test_preprocess.py::test_every_kind_of_file_gives_the_same_documents
touch RUN/STOP
    training/test_stop.py::test_the_file_is_seen_within_a_second_and_one_from_before_is_removed
DATA=
    e2e/test_own_text.py::test_a_text_is_prepared_once_trained_on_and_compared_at_a_resume
TRAIN_ITERS=50 python3 tools/sweep.py
    tools/test_sweep_tool.py::test_every_row_has_its_status_and_the_sweep_goes_on
python3 tools/sweep.py
    tools/test_sweep_tool.py::test_rows_of_a_file
python3 tools/hf_trainer.py
    tools/test_hf_trainer.py::test_its_steps_are_ours
python3 tools/generate.py
    tools/test_generate_and_evaluate.py::test_the_text_is_that_of_transformers_on_the_export
python3 tools/report.py
    analysis/test_report_page.py::test_the_command
python3 tools/evaluate.py
    tools/test_generate_and_evaluate.py::test_the_figures_are_those_of_the_run
"""

_LINES = TEXT.strip().splitlines()
COVERED = dict(zip(_LINES[::2], (line.strip() for line in _LINES[1::2]), strict=True))
"""Beginning of a command -> the test, a file under tests/ and a function in it."""

BY_HAND = {"lm_eval ": "another program, of another environment; the page says what was tried"}
"""Beginning of a command that no test runs -> why."""
