"""How often to save, by what a save costs and how often a job fails."""

from __future__ import annotations

import pytest

from pretrain.resilience import best_save_interval


@pytest.mark.parametrize(("cost", "hours"), [(10.0, 3.0), (60.0, 24.0), (1.0, 0.1)])
def test_the_interval_loses_less_time_than_half_or_twice_of_it(cost: float, hours: float) -> None:
    def lost(interval: float) -> float:
        """Seconds lost per second of work: saves, and on average half an interval for every failure."""
        return cost / interval + (interval / 2 + cost) / (3600 * hours)

    best = best_save_interval(cost, hours)
    assert lost(best) < lost(best / 2)
    assert lost(best) < lost(best * 2)


def test_a_job_that_fails_all_the_time_still_works_half_of_it() -> None:
    assert best_save_interval(100.0, 0.01) == 100.0
