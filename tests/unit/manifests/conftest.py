"""Both overlays, one after the other."""

import pytest

from tests.unit.manifests import rendered


@pytest.fixture(params=[rendered.ONE_NODE, rendered.MANY_NODES])
def objects(request: pytest.FixtureRequest) -> rendered.Objects:
    """The rendered objects of an overlay. Do not change them."""
    return rendered.overlay(request.param)
