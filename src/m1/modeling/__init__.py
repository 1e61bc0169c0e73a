"""Hybrid models: configuration, blocks, mixers, state, and their registration with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from m1.modeling.configuration import M1Config
from m1.modeling.generation_cache import M1Cache
from m1.modeling.hybrid import M1ForCausalLM, M1Model
from m1.modeling.state import ModelState, SequenceLayout

AutoConfig.register("m1", M1Config, exist_ok=True)
AutoModel.register(M1Config, M1Model, exist_ok=True)
AutoModelForCausalLM.register(M1Config, M1ForCausalLM, exist_ok=True)

__all__ = ["M1Cache", "M1Config", "M1ForCausalLM", "M1Model", "ModelState", "SequenceLayout"]
