"""A pytest plugin for transformers' own tests: every NemotronHForCausalLM that they build gets our patches.

Loaded by name from this folder (see test_upstream_suite.py) in a process of its own: the class stays wrapped.
"""

import functools

import pytest
import torch
from transformers import NemotronHForCausalLM

from nemo_ray.model.patches import patch_model

_num_patched = 0


def pytest_configure(config: pytest.Config) -> None:
    original = NemotronHForCausalLM.__init__

    @functools.wraps(original)  # the tests read its signature
    def patched(self: NemotronHForCausalLM, *args: object, **kwargs: object) -> None:
        global _num_patched
        original(self, *args, **kwargs)
        patch_model(self, torch.device("cpu"), torch.float32)
        _num_patched += 1

    NemotronHForCausalLM.__init__ = patched


def pytest_sessionfinish(session: pytest.Session) -> None:
    print(f"\npatched {_num_patched} models")
