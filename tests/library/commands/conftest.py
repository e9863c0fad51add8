import functools

import pytest

from bmrs.training import summarise


@pytest.fixture(scope="module", autouse=True)
def short_measurements():
    """Networks are timed for a moment, as no test of a command asks how fast they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summarise, "latency", functools.partial(summarise.latency, rounds=1, min_seconds=0.0))
        yield
