"""Padded batches: tables by hand, and what must hold of `bucket` at every length."""

import numpy as np
import pytest

from backtrack_jax.models.attention import PAD
from backtrack_jax.models.batching import bucket, left_pad, right_pad

LENGTHS = range(1, 20_000)


def test_left_padding_by_hand():
    ids, positions = left_pad([[7, 8, 9], [5], [1, 2, 3, 4, 6]], 5)
    np.testing.assert_array_equal(ids, [[0, 0, 7, 8, 9], [0, 0, 0, 0, 5], [1, 2, 3, 4, 6]])
    np.testing.assert_array_equal(positions, [[-1, -1, 0, 1, 2], [-1, -1, -1, -1, 0], [0, 1, 2, 3, 4]])
    assert ids.dtype == positions.dtype == np.int32
    assert PAD == -1


def test_right_padding_by_hand():
    ids, positions = right_pad([[7, 8, 9], [5], [1, 2, 3, 4, 6]], 5)
    np.testing.assert_array_equal(ids, [[7, 8, 9, 0, 0], [5, 0, 0, 0, 0], [1, 2, 3, 4, 6]])
    np.testing.assert_array_equal(positions, [[0, 1, 2, -1, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, 4]])
    assert ids.dtype == positions.dtype == np.int32


@pytest.mark.parametrize("pad", [left_pad, right_pad])
def test_padding_is_told_by_position_and_never_by_id(pad):
    """The padding id 0 may be a real token (T11): its position says that it counts."""
    ids, positions = pad([[0, 0], [4]], 3)
    assert ids.sum() == 4
    assert (positions >= 0).sum() == 3


@pytest.mark.parametrize("pad", [left_pad, right_pad])
@pytest.mark.parametrize("length", [0, 4])
def test_a_sequence_that_does_not_fit_is_named(pad, length):
    with pytest.raises(ValueError, match=rf"sequence 1 has {length} tokens, expected 1 to 3"):
        pad([[1, 2], [1] * length], 3)


def test_buckets_hold_their_lengths_and_grow_with_them():
    padded = [bucket(length) for length in LENGTHS]
    assert all(size >= length for size, length in zip(padded, LENGTHS, strict=True))
    assert padded == sorted(padded)
    assert all(bucket(size) == size for size in set(padded)), "a bucket's own size is its bucket"


def test_buckets_waste_less_than_a_step_or_an_eighth():
    for length in LENGTHS:
        assert bucket(length) - length < max(64, length / 8), length


def test_buckets_are_few():
    assert [bucket(length) for length in (1, 64, 65, 512)] == [64, 64, 128, 512]
    assert len({bucket(length) for length in range(1, 513)}) == 8
    for octave in (512, 1024, 8192):
        sizes = {bucket(length) for length in range(octave + 1, 2 * octave + 1)}
        assert len(sizes) <= 8
        assert max(sizes) == 2 * octave


def test_bucket_step_is_the_smallest_size():
    assert [bucket(length, step=8) for length in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, 72]
