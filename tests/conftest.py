"""The options of the tests and their order; what they share is in tests/fixtures.py."""

import pytest

pytest.register_assert_rewrite("tests.fixtures")

# Directories of tests/ in the order in which `make test` starts their files: the longest first, so
# that its processes end together.
LONGEST_FIRST = ("system", "jobs", "cli", "serving", "training")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/goldens")


def pytest_configure(config: pytest.Config) -> None:
    # the process that only starts the others needs no TensorFlow
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)
