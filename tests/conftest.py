"""Settings of all tests."""

import os

import torch
from hypothesis import settings

# The same examples in every run: a red run can be repeated, and a green one means the same everywhere.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

# Without a GPU kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
