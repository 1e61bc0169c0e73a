"""Where no GPU is, Triton kernels run in its interpreter: switched on before anything (transformers, say) imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
