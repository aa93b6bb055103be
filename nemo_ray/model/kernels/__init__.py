"""Triton kernels, each beside a torch reference of the same signature elsewhere in the package.

The kernels are imported only inside the functions that choose them: without a GPU nothing loads Triton.
"""

import torch


def serve(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies where kernels run; asked as `kernels.serve(...)`, one answer for all."""
    return tensor.is_cuda
