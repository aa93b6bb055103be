"""Settings of all tests."""

import os
import signal

import torch
from hypothesis import settings

# The same examples in every run: a red run can be repeated, and a green one means the same everywhere.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")

# Tests send Ctrl-C to processes that they start. In the background of a shell it is ignored, and whatever is
# started there inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
