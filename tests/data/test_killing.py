"""Commands killed at random moments go on to the same bytes. Many more deaths: python tests/data/killing.py prepare 30"""

import pytest
from killing import Prepare, Shuffle, kill_often

SEED = 21


@pytest.mark.parametrize("job", [Prepare, Shuffle])
def test_killed_at_random_moments_it_goes_on_and_makes_nothing_twice(tmp_path, job):
    assert kill_often(job(tmp_path), tmp_path, 2, SEED)["killed"] >= 2
