"""What has to be settled before any test is imported, and what many files share."""

import logging
import os

import pytest


# One thread a process: the models are so small that more only wait for each other, and pytest-xdist has a process on
# every core. What a library reads while it is imported has to be here before torch is.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import FOLDER
from warm_python import WarmPython


# Triton decides when kernels are defined whether its interpreter runs them, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    if getattr(config.option, "cov_source", None):
        os.environ[FOLDER] = str(config.rootpath)


@pytest.fixture
def propagate_logs(monkeypatch):
    """Let caplog see Transformers' loggers, which don't pass on what they log."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


@pytest.fixture(scope="session")
def warm_python():
    """Python whose processes start at once; see WarmPython."""
    with WarmPython() as python:
        yield python
