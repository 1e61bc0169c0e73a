"""M1: hybrid Mamba reasoners from Transformers, and voted test-time compute."""

__version__ = "0.1.0"
