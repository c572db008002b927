"""Functions of the log importance weights; particles lie along the first axis, ``log_w [K, *batch]``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(log_w: Tensor) -> Tensor:
    """``log mean_k exp(log_w_k)``, the K-sample bound of one batch of particles, ``[*batch]``."""
    return log_w.logsumexp(0) - math.log(log_w.shape[0])


def normalized(log_w: Tensor) -> Tensor:
    """Self-normalised importance weights, ``[K, *batch]``; they add up to one over the particles."""
    return log_w.softmax(0)


def mean_of_others(signal: Tensor) -> Tensor:
    """Leave-one-out mean: entry ``k`` is the mean of the *other* entries, ``[K, *batch]``; needs K >= 2."""
    K = signal.shape[0]
    return (signal.sum(0) - signal) / (K - 1)


def log_mean_exp_of_others(log_w: Tensor) -> Tensor:
    """``log mean_{j != k} exp(log_w_j)``, ``[K, *batch]``, stable where one weight holds nearly all the mass; needs K >= 2."""
    K = log_w.shape[0]
    others = ~torch.eye(K, dtype=torch.bool, device=log_w.device)
    masked = log_w.unsqueeze(0).masked_fill(~others.view(K, K, *[1] * (log_w.dim() - 1)), -math.inf)  # [K, K, *batch]
    return masked.logsumexp(1) - math.log(K - 1)


def log_mean_exp_with(log_w: Tensor, replacement: Tensor) -> Tensor:
    """``log mean exp`` with ``log_w_k`` replaced by ``replacement_k``, one ``k`` at a time, ``[K, *batch]``."""
    K = log_w.shape[0]
    if K == 1:
        return replacement
    others = log_mean_exp_of_others(log_w) + math.log(K - 1)
    return torch.logaddexp(others, replacement) - math.log(K)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2``, between 1 and K, ``[*batch]`` (Kong 1992)."""
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
