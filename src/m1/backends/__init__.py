"""Models as `generate` callables (`m1.evaluation.sampling`): what evaluation and voting know of a model. A file each:

engine.py          the engine of this project
ranks.py           the engines of all ranks under torchrun
transformers.py    any causal model under transformers' `generate`
server.py          a server that speaks OpenAI's protocol
vllm.py            vLLM, where it is installed
opening.py         from a command's options to one of these
"""

from m1.backends.engine import engine_backend
from m1.backends.opening import Backend, open_backend, other_ranks_serving

__all__ = ["Backend", "engine_backend", "open_backend", "other_ranks_serving"]
