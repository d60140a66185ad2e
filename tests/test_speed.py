"""Speed of networks, by a clock that only they move."""

import numpy as np
import pytest

from tl_jax import speed


@pytest.fixture
def network(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, 'perf_counter', lambda: clock[0])

    def make(*durations):
        """A network whose calls take these seconds, the last of them for ever; and when it was called."""
        starts = []

        def call():
            clock[0] += durations[min(len(starts), len(durations) - 1)]
            starts.append(clock[0])
            return np.zeros(())

        return call, starts

    return make


def test_the_call_that_compiles_and_a_hiccup_do_not_count(network):
    fast, slow = network(30.0, 0.01, 5.0, 0.01), network(60.0, 0.04)
    found = speed.examples_per_second({'fast': fast[0], 'slow': slow[0]}, 64)
    assert found == {'fast': pytest.approx(6400), 'slow': pytest.approx(1600)}


def test_turns_alternate_and_fit_into_the_budget(network):
    one, other = network(0.1), network(0.15)
    speed.examples_per_second({'one': one[0], 'other': other[0]}, 1)
    assert len(one[1]) == len(other[1]) == 1 + speed.BUDGET_S / 0.25
    assert all(a < b for a, b in zip(one[1], other[1], strict=True))
    assert all(b < a for a, b in zip(one[1][2:], other[1][1:], strict=False))


@pytest.mark.parametrize(('seconds', 'turns'), [(20.0, speed.FEWEST), (1e-6, speed.MOST)])
def test_turns_have_bounds(network, seconds, turns):
    call, starts = network(seconds)
    speed.examples_per_second({'only': call}, 1)
    assert len(starts) == 1 + turns
