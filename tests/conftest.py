"""One thread for each process: bitwise equality holds for equal thread counts, and pytest -n 2 runs
two side by side."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported, and for the scripts that tests start
)
import torch  # noqa: E402

# there is nothing to see without a GPU, or something in its place
collect_ignore = [] if torch.cuda.is_available() or "TEST_DEVICE" in os.environ else ["test_gpu.py"]


@pytest.fixture(autouse=True, scope="session")
def fp32_unless_asked():
    """So that the tolerances of a test do not depend on what the CPU is fast in."""
    import runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "fast_bf16", lambda: False)
        yield


SLOW = """
    test_a_reader_that_goes_away_does_not_stop_the_work
    test_a_small_run_leaves_every_file
    test_a_small_run_leaves_its_files
    test_addt_resumes_bit_for_bit_and_needs_its_classifier
    test_addt_trains_with_a_compiled_classifier
    test_adversarial_training_compiles_two_graphs
    test_an_attack_compiles_no_graph_for_a_short_batch
    test_an_objective_a_corruption_and_a_sampler_are_one_row_each
    test_command
    test_compile_without_a_compiler
    test_compiled_attack_and_loss_equal_eager
    test_compiles_without_a_break
    test_compiling_changes_no_result
    test_damaged_fields_are_refused_or_change_nothing
    test_devices_of_a_purifier_under_attack
    test_dinov2_from_a_local_clone
    test_first_phase_is_plain_ddpm
    test_full_disk_keeps_the_previous_checkpoint
    test_the_figures_of_a_notebook
    test_commands_of_the_readme_write_where_they_say
    test_growing_iters_past_the_change_is_refused
    test_half_written_log_line_does_not_stop_a_resume
    test_image_i_depends_on_seed_and_i_alone
    test_init_starts_from_the_ema_weights
    test_integer_kernels_equal_eager
    test_a_step_is_counted
    test_kernels_of_a_step
    test_kernels_of_the_noise
    test_kill_and_resume_equals_uninterrupted
    test_network_and_sampler_steps_are_one_graph
    test_no_gradient_is_given_twice
    test_purification_compiles_no_graph_for_a_short_batch
    test_purification_never_waits_for_the_gpu
    test_resume_in_either_phase_equals_uninterrupted
    test_rivals_resume_bit_for_bit
    test_sigterm_saves_and_exits_cleanly
    test_step_never_waits_for_the_device
    test_stops_and_continues
    test_streamed_data_trains_the_same
    test_two_nodes_train_as_one_process
    test_two_processes_and_accumulation_equal_one_process
    test_two_processes_make_the_same_samples
""".split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """test_cuda.py first: it pretends that a GPU is there, which PyTorch believes only before it
    has looked for one. Tests of seconds are marked; `-m ""` runs them too."""
    items.sort(key=lambda item: item.path.name != "test_cuda.py")
    for item in items:
        if item.originalname in SLOW:
            item.add_marker(pytest.mark.slow)
