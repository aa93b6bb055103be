"""Triton kernels, each beside a torch reference of the same signature elsewhere in the model.

Imported only inside the functions that choose them: without a GPU nothing here is loaded.
"""
