"""Weights made from seeds, so that the golden files need not store them.

A network is given as its golden outputs plus a seed. Key number j of the sorted
state dict is filled from ``numpy.random.RandomState(seed + j)``; every
implementation with the same parameter names and shapes ends up with the same
weights, whatever order it declares them in.
"""

import numpy as np
import torch

# Constants of an architecture stay as built (but still count as key j).
KEPT = ("num_batches_tracked", "input_mean", "input_std", "resample_filter", "kernel")


def filled_value(key: str, shape: tuple[int, ...], seed: int, scheme: str = "filled") -> np.ndarray:
    """Value of one state-dict entry, float32; `seed` already includes the key's number."""
    n = np.random.RandomState(seed).standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    if scheme == "equalised":
        value = n if len(shape) >= 2 else 0.1 * n
    elif scheme != "filled":
        raise ValueError(f"scheme is {scheme!r}; it must be 'filled' or 'equalised'")
    elif leaf == "running_var":
        value = np.exp(0.1 * n)
    elif leaf == "running_mean":
        value = 0.1 * n
    elif len(shape) >= 2:
        value = n / np.sqrt(np.prod(shape[1:]))
    elif len(shape) == 1 and leaf == "weight":
        value = 1 + 0.1 * n
    else:
        value = 0.1 * n
    return np.asarray(value, dtype=np.float32)


def fill(module: torch.nn.Module, seed: int, scheme: str = "filled") -> torch.nn.Module:
    """Fill parameters and buffers of `module` in place; returns it.

    scheme "filled": tensors of 2 or more dimensions have unit gain, affine weights
    lie around 1, running variances around 1. scheme "equalised": tensors of 2 or
    more dimensions are unit normal (for networks that scale their weights at run time).
    """
    state = module.state_dict()
    with torch.no_grad():
        for j, key in enumerate(sorted(state)):
            if key.rsplit(".", 1)[-1] not in KEPT:
                value = filled_value(key, tuple(state[key].shape), seed + j, scheme)
                state[key].copy_(torch.from_numpy(value))
    return module


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, the measure of agreement with a golden array b."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    return ((a - b).abs().max() / b.abs().max()).item()
