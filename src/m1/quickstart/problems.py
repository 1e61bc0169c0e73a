"""The quickstart's problems and documents: distinct held-out problems, the teacher's answers, solutions to imitate."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from m1.engine.llm import Engine
from m1.engine.sampling_params import SamplingParams
from m1.quickstart.recipe import Recipe
from m1.reasoning.problems import Problem, generate_problems
from m1.training.data import make_documents
from m1.training.packing import Document

MAX_LENGTH = 512


def draw_problems(recipe: Recipe, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems; no question stands twice, so none is in both."""
    wanted = recipe.num_train_problems + recipe.num_heldout_problems
    drawn = generate_problems(recipe.generator, 3 * wanted, seed, **recipe.generator_config)
    distinct = list({problem.problem: problem for problem in drawn}.values())
    if len(distinct) < wanted:
        raise ValueError(f"{recipe.generator} with {recipe.generator_config} has too few different problems: {len(distinct)}")
    return distinct[recipe.num_heldout_problems : wanted], distinct[: recipe.num_heldout_problems]


def to_prompt(problem: Problem) -> list[dict[str, str]]:
    """The problem as a user's message, with nothing added: a short prompt keeps a small machine quick."""
    return [{"role": "user", "content": problem.problem}]


def answers_of(
    engine: Engine, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, params: SamplingParams, loss_on: str
) -> list[Document]:
    """What the engine's model answers, one sample a problem, as documents; `loss_on` is "completion" or "all"."""
    completions = engine.generate([to_prompt(problem) for problem in problems], params)
    rows = [
        {"prompt": problem.problem, "completion": samples[0].text}
        for problem, samples in zip(problems, completions, strict=True)
        if samples[0].text.strip()
    ]
    return make_documents(rows, tokenizer, max_length=MAX_LENGTH, loss_on=loss_on)


def solutions_to(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Documents in which the answer stands in a box: what fine-tuning imitates."""
    rows: list[Mapping[str, Any]] = [
        {"prompt": problem.problem, "completion": f"\\boxed{{{problem.answer}}}"} for problem in problems
    ]
    return make_documents(rows, tokenizer, max_length=MAX_LENGTH)
