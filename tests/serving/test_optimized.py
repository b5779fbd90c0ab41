"""That a test fails when it should, also under `python -O`, which test_fuzz.py runs the tests of bounds by."""

import pytest


def test_assertions_of_tests_stay():
    with pytest.raises(AssertionError):
        assert not 1
