"""The README's table "What happens when...": every row is held by tests, and every message in it is one of the program's."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("## What happens when...")[1].split("\n## ")[0]
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("|")][2:]
ROWS = {what: (seen, code) for what, seen, code in TABLE if seen}

# What happens, by the beginning of its row -> the tests, by name, that fail when it is no longer so.
HELD_BY = {
    "SIGTERM, SIGUSR1, a closed": "a_stopped_run_continues_to_the_same_result_bit_for_bit "
                                  "a_signal_between_steps_waits_to_be_asked_for",
    "a second Ctrl-C": "a_second_signal_stops_at_once a_signal_outside_of_training_stops_at_once",
    "`kill -9` or a power cut": "a_hundred_kills_during_saves_leave_a_hundred_good_files "
                                "save_interrupted_before_replace_leaves_the_old_file_loadable",
    "`last.pt` is empty": "a_damaged_file_is_noticed_and_the_one_before_used "
                          "one_flipped_byte_is_noticed_though_torch_does_not",
    "all checkpoints are damaged": "all_checkpoints_damaged_is_an_error_and_never_a_fresh_start",
    "the disk is full": "full_disk_keeps_the_old_file_and_leaves_no_other",
    "a log or the report": "a_log_that_cannot_be_written_is_said_once_and_stops_nothing",
    "`--resume` where there is nothing": "resume_in_an_empty_folder_starts_afresh",
    "`--resume` of a finished run": "resuming_a_finished_run_touches_nothing",
    "`--out` already holds": "a_used_run_folder_needs_resume",
    "another run is using": "a_second_run_in_the_same_folder_is_refused",
    "`--out` cannot be written": "wrong_input_is_one_line_and_code_2_before_any_training",
    "the run folder is removed": "a_run_folder_that_is_deleted_on_the_way_ends_the_run_in_a_line "
                                 "a_run_writes_nothing_into_a_folder_that_has_taken_the_place_of_its_own",
    "a file holds code": "code_in_a_file_is_named_and_not_run_by_any_command",
    "a file is something else": "what_is_no_checkpoint_is_said_to_be_none_by_every_command",
    "weights are given to": "weights_given_to_resume_are_pointed_to_init_from",
    "a checkpoint is of a newer": "a_newer_format_asks_for_an_upgrade a_key_of_a_newer_version_asks_for_an_upgrade "
                                  "the_checkpoint_of_format_1_loads_and_goes_on",
    "another option that changes": "resuming_with_other_options_is_refused_by_name",
    "images were added": "a_renamed_image_is_another_set_of_images resuming_with_other_images_is_refused",
    "another `--amp`": "another_precision_is_noted_and_the_run_goes_on another_device_is_noted "
                       "one_process_goes_on_with_a_run_of_two_and_says_so",
    "another `--workers`": "harmless_options_may_change_and_change_nothing worker_count_does_not_change_the_result",
    "a checkpoint of a GPU": "a_checkpoint_from_a_gpu_loads_without_one weights_of_a_wrapped_network_are_accepted "
                             "a_checkpoint_of_a_wrapped_network_is_accepted a_compiled_run_writes_plain_names",
    "`--init-from` does not fit": "weights_of_another_network_are_refused_by_name",
    "files are torn": "a_run_over_bad_files_resumes_to_the_same_result_bit_for_bit "
                      "bad_files_met_before_an_interruption_are_told_after_it a_locked_file_is_passed_over "
                      "a_file_that_goes_during_training_is_passed_over "
                      "bad_files_are_replaced_the_same_way_and_move_nothing_else",
    "more than 10 %": "a_tenth_of_bad_files_is_passed_over_and_one_more_is_not",
    "all of them": "a_folder_of_nothing_but_bad_files_is_wrong_input",
    "a small file claims": "bombs_are_refused_with_bounded_memory",
    "CMYK, palettes": "cmyk_is_ink_on_white a_png_colour_that_is_named_transparent_becomes_white "
                      "a_palettes_alpha_is_mixed_with_white transparency_lies_on_white one_bit_becomes_black_and_white "
                      "unsigned_32_bits_do_not_turn_negative deep_greys_are_scaled_whatever_the_byte_order",
    "EXIF orientations": "every_exif_orientation_is_undone of_several_frames_the_first_is_taken",
    "pictures in other formats": "scan_is_recursive_sorted_and_knows_its_suffixes",
    "images of 1x1": "images_of_one_pixel_and_of_one_line_are_trained_on",
    "`--data` is mistyped": "what_is_missing_is_named_with_what_is_there",
    "no images": "what_is_missing_is_named_with_what_is_there",
    "fewer images than a batch": "batches_that_do_not_fit_are_refused",
    "links, loops": "links_are_followed_once_and_loops_end hidden_files_and_archive_leftovers_are_left_out "
                    "images_under_a_link_are_found_once_and_a_broken_link_is_a_bad_file",
    "names that are not text": "odd_names_are_trained_on_and_shown_escaped",
    "a sub-folder is locked": "a_folder_that_is_locked_is_told",
    "the data is read-only": "nothing_is_written_beside_the_images",
    "the loss or a gradient": "loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_file "
                              "a_loss_that_is_not_finite_never_reaches_the_weights",
    "float16 overflows": "a_step_that_the_scaler_skips_moves_nothing endless_overflow_in_float16_stops_the_run",
    "a weight or batch norm": "a_network_that_is_not_finite_is_not_saved "
                              "weights_or_statistics_that_are_not_finite_are_never_saved",
    "features collapse": "a_constant_encoder_is_reported_as_collapsed collapsed_run_says_so_first_and_what_to_do",
    "an option is wrong": "a_wrong_option_is_one_line_and_code_2",
    "no GPU; several GPUs": "a_run_without_an_accelerator_says_so of_several_gpus_one_is_used_and_how_to_use_all_is_said",
    "`--device cuda` without": "wrong_input_is_one_line_and_code_2_before_any_training",
    "a data worker is killed": "a_worker_that_died_is_an_error_when_a_batch_is_waited_for_and_not_before "
                               "a_worker_that_dies_while_a_batch_is_fetched_from_it_is_named "
                               "a_run_whose_worker_dies_saves_what_it_has_and_goes_on_exactly",
    "data workers hang": "workers_that_hang_are_an_error_after_a_while_and_are_killed "
                         "workers_that_are_frozen_are_killed_although_torch_waits_for_them_without_limit",
    "shared memory is full": "too_little_shared_memory_is_an_error_and_not_an_endless_wait",
    "memory is full": "out_of_memory_is_one_line_with_what_to_try_and_keeps_the_checkpoint",
    "torch and torchvision": "libraries_that_do_not_fit_are_named",
    "no class folders; classes": "labels_that_allow_no_measuring_stop_no_training labels_that_allow_no_measuring_are_refused",
    "`--tensorboard` without": "without_the_package_it_is_one_line_and_code_2 "
                               "events_that_cannot_be_written_are_said_once_and_stop_nothing",
    "an export without": "without_the_packages_of_onnx_it_says_what_to_install a_file_that_gives_other_features_is_not_kept",
    "features are not finite": "features_that_are_not_finite_name_the_first_file",
    "features are all alike": "collapsed_features_are_scored_with_a_warning_beside_the_majority "
                              "images_on_both_sides_are_counted_by_path_and_by_content",
    "a classifier fails": "a_classifier_that_fails_is_named_with_its_reason",
}


JOINTS = re.compile(r"\.\.\.| - |[;()]|, |^warning: | is (?=damaged)| (?=at epoch)")  # where the program may join strings


def messages_of_the_program() -> str:
    """Every string in the sources, with ... for what is filled in."""
    texts = []
    for path in [ROOT / "train.py", *sorted((ROOT / "byol_core").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def how_often_tests_are_there() -> Counter[str]:
    """How often each name of a test occurs."""
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.rglob("test_*.py")]
    return Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_row_has_its_tests_and_nothing_else_is_listed() -> None:
    held = {start: [what for what in ROWS if what.startswith(start)] for start in HELD_BY}
    assert all(len(rows) == 1 for rows in held.values()), held
    assert {row for rows in held.values() for row in rows} == set(ROWS)
    tests = {name for names in HELD_BY.values() for name in names.split()}
    assert f"faults tried {len(ROWS)}, survived {len(ROWS)}, tests {len(tests)}." in " ".join(SECTION.split())
    assert all(re.fullmatch(r"\d+(, \d+)*", code) for _, code in ROWS.values())


def test_tests_of_each_row_exist() -> None:
    found = how_often_tests_are_there()
    assert [name for names in HELD_BY.values() for name in names.split() if found[f"test_{name}"] != 1] == []


def test_messages_of_each_row_are_the_programs() -> None:
    known = messages_of_the_program()
    for message in [message for seen, _ in ROWS.values() for message in re.findall(r"`([^`]*)`", seen)]:
        for fragment in JOINTS.split(message):
            words = fragment.strip(" :,%")
            assert words in known or re.fullmatch(r"(last|bad_files)\.\w+|--[a-z-]+", words), words
