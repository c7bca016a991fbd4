"""How much of the package the tests' other processes reach, added to what pytest-cov measures in its own."""

import contextlib
import os
from collections.abc import Iterator


# The folder of the project, where pytest-cov gathers the data; unset where nothing is measured.
FOLDER = "TESTS_MEASURED_IN"


@contextlib.contextmanager
def measured() -> Iterator[None]:
    """Measure what runs within, in a process that pytest-cov doesn't see."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        yield
        return
    import coverage

    measuring = coverage.Coverage(f"{folder}/.coverage", data_suffix=True, config_file=f"{folder}/pyproject.toml")
    measuring.start()
    try:
        yield
    finally:
        measuring.stop()
        measuring.save()
