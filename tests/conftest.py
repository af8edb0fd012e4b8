"""Triton kernels run interpreted on machines without a device; it must be decided before any of them is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
