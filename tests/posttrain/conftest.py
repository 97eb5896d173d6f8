"""What tests of several folders below share."""

from collections.abc import Iterator

import pytest

from tests.posttrain.judge_server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    """A judge behind an HTTP interface."""
    with serving() as state:
        yield state
