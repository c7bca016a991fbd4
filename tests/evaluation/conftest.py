"""What the tests of the evaluation share."""

import datasets
import pytest
from transformers import logging


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    logging.enable_progress_bar()
    datasets.enable_progress_bars()
