"""What has to be settled before any test is imported."""

import os

import torch


# Triton decides when kernels are defined whether its interpreter runs them, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
