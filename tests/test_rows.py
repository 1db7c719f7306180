"""What a row says about inputs and targets."""

import subprocess
import sys

import jax
import numpy as np

from mobilellm_jax.data.rows import PADDING, asked, inputs_and_targets, is_target, no_target, targets_of


def test_inputs_and_targets_of_text_are_the_tokens():
    rows = np.array([[3, 0, 7, 5]], np.int32)
    tokens, targets = inputs_and_targets(jax.numpy.array(rows))
    np.testing.assert_array_equal(tokens, [[3, 0, 7]])
    np.testing.assert_array_equal(targets, [[0, 7, 5]])


def test_what_is_marked_is_an_input_and_no_target():
    rows = np.array([[no_target(3), 0, no_target(7), 5, PADDING, PADDING]], np.int32)
    tokens, targets = inputs_and_targets(jax.numpy.array(rows))
    np.testing.assert_array_equal(tokens, [[3, 0, 7, 5, 0]])
    np.testing.assert_array_equal(targets >= 0, [[True, False, True, False, False]])


def test_an_answer_that_is_not_fed_back_is_a_target_beside_another_input():
    """Also at the largest ids; NumPy and JAX read the same."""
    most = 2**15 - 1
    rows = np.array([[4, asked(0, most), no_target(3), asked(most, 0), 9, asked(2, 6)]], np.int32)
    tokens, targets = inputs_and_targets(jax.numpy.array(rows))
    np.testing.assert_array_equal(tokens, [[4, 0, 3, most, 9]])
    np.testing.assert_array_equal(targets, [[most, ~3, 0, 9, 6]])
    np.testing.assert_array_equal(targets_of(rows), targets)
    assert is_target(rows).tolist() == [[True, True, False, True, True, True]]


def test_token_0_can_be_marked():
    assert (PADDING, no_target(0), no_target(5)) == (-1, -1, -6)
    np.testing.assert_array_equal(is_target(np.array([0, 1, no_target(0), no_target(1)])), [1, 1, 0, 0])


def test_preparing_data_needs_no_jax():
    code = "import sys, mobilellm_jax.data; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
