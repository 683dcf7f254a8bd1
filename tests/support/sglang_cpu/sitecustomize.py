"""Two things that SGLang 0.5.19 misses on a CPU; every process of its server reads this (tests/test_sglang.py).

torchvision's wheels are linked against CUDA, and importing them without it fails for want of two operators, which
nothing here calls.
"""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
