"""One cluster of several nodes for the tests of this folder, gone when they are done."""

from collections.abc import Iterator

import pytest

from tests.cluster.fleet.audit import Facts, quiet_run
from tests.cluster.fleet.fleet import Fleet, until
from tests.cluster.fleet.load import Order


@pytest.fixture(scope="package")
def running_fleet() -> Iterator[Fleet]:
    with Fleet() as fleet:
        yield fleet


@pytest.fixture(scope="package")
def references(running_fleet: Fleet) -> dict[Order, Facts]:
    """What every order of the mix gives while nothing is killed."""
    return quiet_run(running_fleet)


@pytest.fixture
def fleet(running_fleet: Fleet) -> Fleet:
    """The fleet, once everything that an earlier test broke runs again."""
    until(running_fleet.is_whole, "the whole fleet at work", 300)
    return running_fleet
