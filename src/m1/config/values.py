"""What options of several commands may be, and the suffix of every problem."""

from typing import Literal

MixerName = Literal["mamba1", "mamba2"]
DeviceName = Literal["auto", "cpu", "cuda"]
ParameterGroup = Literal["mixers", "attention", "mlp", "norms", "embeddings"]

PROBLEM_SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."
"""What is added to every problem, in training and in solving: the instruction that M1 was trained with (arXiv 2504.10449)."""
