"""Drawing groups: when a step goes on sampling and when not, what length costs, and what is said of it all."""

import numpy as np
import pytest

from m1.config import GRPOConfig
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Score
from m1.training.groups import Draw, Group, GroupSource, describe
from m1.training.rollouts import ProblemStream, Sample


class Scripted:
    """Sampler and scorer in one: problem i scores the i-th list of rewards, its samples have the i-th list of lengths."""

    def __init__(self, rewards, lengths=None):
        self.rewards, self.lengths, self.counts, self.seeds = rewards, lengths, [], []

    def sample(self, prompts, *, seeds, num_samples, max_new_tokens, temperature):
        self.counts.append(len(prompts))
        self.seeds += seeds
        return [[self._one(prompt[0], number) for number in range(num_samples)] for prompt in prompts]

    def _one(self, problem, number):
        length = self.lengths[problem][number] if self.lengths else 2
        return Sample([1] * length, [-0.5] * length, f"{problem} {number}", length == 10)

    def score_many(self, problems, completions):
        return [Score(self.rewards[int(p.id)][int(text.split()[1])], None) for p, text in zip(problems, completions)]


def draw(script, *, step=0, **fields):
    config = GRPOConfig(**{"problems_per_step": 2, "samples_per_problem": 2, "max_new_tokens": 10} | fields)
    stream = ProblemStream([Problem(str(number), "", "") for number in range(len(script.rewards))], seed=0)
    stream.next_problems = _in_order(stream)
    source = GroupSource(stream, lambda problem: [int(problem.id)], config, sampler=script, scorer=script)
    return source.draw(step)


def _in_order(stream):
    def next_problems(count):
        stream.position += count
        return [stream.problems[i % len(stream.problems)] for i in range(stream.position - count, stream.position)]

    return next_problems


SAME, DIFFERENT = [1.0, 1.0], [0.0, 1.0]


def test_without_refill_a_step_samples_once():
    script = Scripted([SAME, SAME])
    assert draw(script).num_useful == 0
    assert script.counts == [2]


@pytest.mark.parametrize(
    ("rewards", "refill", "counts", "useful"),
    [
        ([DIFFERENT, DIFFERENT], 4, [2], 2),  # enough at once
        ([SAME, DIFFERENT, SAME, DIFFERENT], 4, [2, 2], 2),  # one of two was useful: two more for one that is missing
        ([SAME, DIFFERENT, SAME, SAME, DIFFERENT, SAME], 4, [2, 2, 4], 3),  # a quarter is: four more
        ([SAME, SAME], 4, [2, 6], 0),  # none is: up to the limit, and no further
        ([SAME, SAME], 1.5, [2, 1], 0),
        ([SAME, DIFFERENT], 1.5, [2, 1], 1),
    ],
)
def test_a_refill_samples_until_enough_groups_differ(rewards, refill, counts, useful):
    script = Scripted(rewards)
    drawn = draw(script, refill=refill)
    assert script.counts == counts
    assert len(drawn.groups) == sum(counts)
    assert drawn.num_useful == useful
    assert len(set(script.seeds)) == len(script.seeds), "a problem that comes again is not sampled alike"


def test_seeds_differ_by_step():
    one, other = Scripted([SAME, SAME]), Scripted([SAME, SAME])
    draw(one, step=0)
    draw(other, step=1)
    assert not set(one.seeds) & set(other.seeds)


def test_length_costs_reward_near_the_limit():
    """Soft overlong punishment with a buffer of 4 below 10 tokens: free up to 6, then a quarter a token."""
    script = Scripted([[1.0] * 5, [0.0] * 5], [[1, 6, 7, 9, 10], [10, 10, 10, 10, 10]])
    drawn = draw(script, samples_per_problem=5, overlong_buffer=4)
    np.testing.assert_allclose(drawn.groups[0].rewards, [1.0, 1.0, 0.75, 0.25, 0.0])
    np.testing.assert_allclose(drawn.groups[1].rewards, [-1.0] * 5)
    assert [group.is_useful for group in drawn.groups] == [True, False]
    assert describe(drawn)["reward"] == 0.5, "what is reported is the score itself"


def test_what_was_drawn_is_described():
    def group(rewards, lengths, reason=None):
        samples = [Sample([1] * n, [-0.5] * n, "", n == 10) for n in lengths]
        return Group([1], samples, [Score(reward, None, reason) for reward in rewards], np.array(rewards))

    groups = [
        group([1.0, 0.0], [2, 10]),
        group([0.5, 0.5], [4, 4]),
        group([0.0, 0.0], [1, 3], "crashed"),
        group([1.0] * 2, [8, 8]),
    ]
    metrics = describe(Draw(groups, seconds_sampling=2.0, seconds_rewards=1.0))
    assert metrics == {
        "reward": 0.5,
        "pass_at_1": 3 / 8,
        "pass_at_k": 2 / 4,
        "length": 5.0,
        "truncated": 1 / 8,
        "groups": 4,
        "dropped_groups": 0.75,
        "failed_rewards": 2,
        "seconds_sampling": 2.0,
        "seconds_rewards": 1.0,
        "sampled_tokens_per_second": 20.0,
    }


def test_a_reward_that_fails_is_reported():
    script = Scripted([SAME, SAME])
    script.score_many = lambda problems, completions: [Score(0.0, None, "was killed by SIGSEGV") for _ in problems]
    with pytest.warns(UserWarning, match="a reward could not be computed and counts as 0: was killed by SIGSEGV"):
        draw(script)
