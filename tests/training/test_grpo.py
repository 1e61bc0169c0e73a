"""GRPO: advantages, batches, the toy that it must solve, and the engine as its sampler."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m1.config import GRPOConfig
from m1.modeling import SequenceLayout
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Score, Scorer
from m1.training.groups import group_advantages
from m1.training.grpo import GRPOStage, Rollout, grpo, pack_rollouts, within_pass_rates
from m1.training.loop import _accumulate
from m1.training.optimizer import select_trainable
from m1.training.rollouts import EngineSampler, ProblemStream, Sample
from m1.training.run_directory import RunDirectory
from tests.numerics import CACHED_EQUALS_PLAIN, REL_RMS, rel_rms
from tests.training import tiny

TOKENIZER = tiny.word_tokenizer("a b c d e f g")
PROBLEMS = [Problem(str(i), prompt, "c") for i, prompt in enumerate(["a b", "d", "e f g"])]


class PlainSampler:
    """Samples by whole forward passes: slow and plain. Remembers what it was asked."""

    def __init__(self, model, tokenizer=TOKENIZER):
        self.model, self.tokenizer, self.seeds = model, tokenizer, []

    @torch.no_grad()
    def sample(self, prompts, *, seeds, num_samples, max_new_tokens, temperature):
        self.seeds.append(tuple(seeds))
        return [
            [self._one(prompt, max_new_tokens, temperature, generator) for _ in range(num_samples)]
            for prompt, generator in zip(prompts, map(torch.Generator().manual_seed, seeds), strict=True)
        ]

    def _one(self, prompt, max_new_tokens, temperature, generator):
        tokens, log_probs = [], []
        while len(tokens) < max_new_tokens and 0 not in tokens:
            ids = torch.tensor(prompt + tokens)
            hidden = self.model.model.forward_packed(
                self.model.model.embed_tokens(ids), SequenceLayout.from_lengths([len(ids)])
            )
            scores = F.log_softmax(self.model.lm_head(hidden[-1]) / temperature, -1)
            tokens.append(int(torch.multinomial(scores.exp(), 1, generator=generator)))
            log_probs.append(float(scores[tokens[-1]]))
        return Sample(tokens, log_probs, self.tokenizer.decode(tokens, skip_special_tokens=True), 0 not in tokens)


class RewardExactly:
    """1 for the text that is the problem's answer."""

    def score_many(self, problems, completions):
        return [Score(float(text == problem.answer), text) for problem, text in zip(problems, completions, strict=True)]


class RewardBeginning:
    """1 for a text that begins with the problem's answer: one of eight, at first."""

    def score_many(self, problems, completions):
        return [Score(float(text[:1] == problem.answer), text) for problem, text in zip(problems, completions, strict=True)]


class RewardNothing:
    def score_many(self, problems, completions):
        return [Score(0.0, None, "took too long") for _ in completions]


def make_config(**fields):
    defaults = {
        "steps": 20,
        "problems_per_step": 3,
        "samples_per_problem": 8,
        "max_new_tokens": 3,
        "tokens_per_batch": 60,
        "max_length": 20,
        "learning_rate": 2e-2,
        "min_learning_rate_ratio": 1.0,
        "precision": "float32",
        "suffix": "",
    }
    return GRPOConfig(**defaults | fields)


def make_model(mixer="mamba2", seed=0):
    model = tiny.model(mixer, vocab_size=8, seed=seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.25)
    return model


def test_advantages_are_relative_to_the_group():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 2.0, 0.0, 2.0]])
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(advantages[0], (rewards[0] - 0.25) / (np.sqrt(3) / 4 + 1e-6))
    assert (advantages[1:3] == 0).all()
    np.testing.assert_allclose(advantages[3], [-1, 1, -1, 1], rtol=1e-5)


def test_packed_rollouts_line_up():
    first = Rollout([5, 6], Sample([1, 2, 0], [-0.1, -0.2, -0.3], "", False), 1.5)
    second = Rollout([7], Sample([3], [-0.4], "", True), -0.5)
    batch = pack_rollouts([first, second])
    assert batch.packed.input_ids.tolist() == [5, 6, 1, 2, 0, 7, 3]
    assert batch.tokens.targets.tolist() == [1, 2, 0, 3]
    assert batch.packed.target_positions.tolist() == [1, 2, 3, 5]
    assert batch.tokens.advantages.tolist() == [1.5, 1.5, 1.5, -0.5]
    assert batch.tokens.sampler_log_probs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert (batch.num_tokens, batch.num_targets) == (7, 4)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_the_toy_reaches_its_optimum(mixer):
    """Every prompt wants the completion "c <end>", which a fresh model gives in two of a hundred samples."""
    model = make_model(mixer)
    config = make_config(samples_per_problem=32, tokens_per_batch=600)
    result = grpo(model, TOKENIZER, PROBLEMS, config, scorer=RewardExactly(), progress=False)
    rewards = [record["reward"] for record in result.metrics]
    assert np.mean(rewards[:2]) < 0.1
    assert np.mean(rewards[-3:]) > 0.9
    assert result.last["pass_at_k"] == 1.0
    assert result.last["length"] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("updates", [1, 3])
def test_a_rewarded_token_becomes_more_probable(updates):
    model, config = make_model(), make_config(steps=1, samples_per_problem=24, updates_per_step=updates, learning_rate=3e-3)
    sampler = PlainSampler(model)

    def log_prob_of_answer():
        ids = torch.tensor([1, 2, 3])
        hidden = model.model.forward_packed(model.model.embed_tokens(ids), SequenceLayout.from_lengths([3]))
        return F.log_softmax(model.lm_head(hidden[1]), -1)[3].item()

    before = log_prob_of_answer()
    result = grpo(model, TOKENIZER, PROBLEMS[:1], config, sampler=sampler, scorer=RewardBeginning(), progress=False)
    assert 0 < result.last["reward"] < 1
    assert log_prob_of_answer() > before + 0.01
    assert result.last["log_prob_gap"] < 1e-5
    assert result.last["importance_weight"] == pytest.approx(1.0, abs=1e-5)


def make_stage(model, config, scorer=None, sampler=None):
    sampler = sampler or PlainSampler(model)
    return GRPOStage(model, TOKENIZER, PROBLEMS, config, sampler=sampler, scorer=scorer or RewardBeginning())


def test_groups_that_teach_nothing_are_dropped():
    model, config = make_model(), make_config(problems_per_step=6)
    stage = make_stage(model, config)
    step = stage.draw(0)
    kept = round(6 * (1 - step.metrics["dropped_groups"]))
    assert 0 < kept < 6
    packed = sum(batch.packed.layout.num_sequences for batches in step.updates for batch in batches)
    assert packed == kept * config.samples_per_problem
    with pytest.warns(UserWarning, match="took too long"):
        nothing = make_stage(model, config, RewardNothing()).draw(0)
    assert nothing.updates == []
    assert (nothing.metrics["dropped_groups"], nothing.metrics["failed_rewards"]) == (1.0, 48)


@pytest.mark.filterwarnings("ignore:a reward could not be computed")
def test_a_step_in_which_nothing_was_solved_is_no_accident():
    model = make_model()
    result = grpo(
        model, TOKENIZER, PROBLEMS, make_config(steps=2), sampler=PlainSampler(model), scorer=RewardNothing(), progress=False
    )
    assert [record["reward"] for record in result.metrics] == [0.0, 0.0]
    for name, parameter in make_model().named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_a_refilled_step_has_all_its_groups():
    model, config = make_model(), make_config(problems_per_step=6, refill=20.0, samples_per_problem=4)
    step = make_stage(model, config).draw(0)
    assert step.metrics["groups"] > 6
    packed = sum(batch.packed.layout.num_sequences for batches in step.updates for batch in batches)
    assert packed == 6 * 4


def test_samples_that_were_cut_off_can_be_left_out():
    """They count in their group's mean, but no gradient comes from them."""
    model = make_model()
    drawn = {name: make_stage(model, make_config(problems_per_step=6, overlong=name)).draw(0) for name in ("keep", "drop")}
    assert drawn["keep"].metrics["truncated"] > 0

    def tokens(step):
        """(tokens, advantage) of each sample, in no order."""
        return sorted(
            (tuple(targets.tolist()), advantages[0].item())
            for batches in step.updates
            for batch in batches
            for targets, advantages in _by_sample(batch)
        )

    kept, left = tokens(drawn["keep"]), tokens(drawn["drop"])
    assert left == [(targets, advantage) for targets, advantage in kept if targets[-1] == 0]
    assert 0 < len(left) < len(kept)


def _by_sample(batch):
    """(targets, advantages) of each sample of a batch."""
    document = torch.bucketize(batch.packed.target_positions, batch.packed.layout.cu_seqlens[1:], right=True)
    for number in document.unique():
        yield batch.tokens.targets[document == number], batch.tokens.advantages[document == number]


@pytest.mark.filterwarnings("ignore:a reward could not be computed")
def test_rewards_that_die_or_hang_do_not_end_a_run():
    model, config = make_model(), make_config(steps=2, samples_per_problem=8)
    problems = [replace(PROBLEMS[0], reward="tests.reasoning.reward_functions:fragile")]
    with Scorer(time_limit=0.2, num_workers=2) as scorer:
        result = grpo(model, TOKENIZER, problems, config, sampler=PlainSampler(model), scorer=scorer, progress=False)
    assert [record["step"] for record in result.metrics] == [1, 2]
    assert sum(record["failed_rewards"] for record in result.metrics) > 0
    assert any(record["reward"] > 0 for record in result.metrics)


def test_an_accumulated_gradient_is_the_large_batchs():
    model = make_model()
    large, small = (make_config(samples_per_problem=24, tokens_per_batch=size) for size in (10_000, 20))
    gradients = []
    for config in (large, small):
        stage = make_stage(model, config)
        (batches,) = stage.draw(0).updates
        _accumulate(model, stage, batches, config)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(batches) > 3
    for one, other in zip(*gradients):
        assert rel_rms(one, other) < REL_RMS[torch.float32] * 10  # signed advantages cancel: terms are larger than their sum


def test_old_log_probs_are_those_of_the_policy_that_sampled():
    model = make_model()
    stage = make_stage(model, make_config(updates_per_step=2, temperature=0.7, kl_weight=0.1))
    updates = stage.draw(0).updates
    assert len(updates) == 2
    for batches in updates:
        for batch in batches:
            torch.testing.assert_close(batch.tokens.old_log_probs, batch.tokens.sampler_log_probs, rtol=1e-4, atol=1e-5)
            # The reference is the model at the start, which is this one.
            torch.testing.assert_close(batch.tokens.reference_log_probs, batch.tokens.old_log_probs, rtol=1e-4, atol=1e-5)


def test_the_reference_stays_behind():
    model, config = make_model(), make_config(steps=3, kl_weight=0.05)
    sampler = PlainSampler(model)
    result = grpo(model, TOKENIZER, PROBLEMS, config, sampler=sampler, scorer=RewardBeginning(), progress=False)
    assert len(set(sampler.seeds)) == 3  # and every step samples anew
    divergences = [record["kl"] for record in result.metrics if "kl" in record]
    assert abs(divergences[0]) < 1e-6
    assert divergences[-1] > 1e-3


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("precision", "keeps_memory"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_the_engine_samples_from_the_model_being_trained(mixer, precision, keeps_memory):
    model = make_model(mixer)
    select_trainable(model, [])
    prompts = [[1, 2], [4], [5, 6, 7]]
    sampler = EngineSampler(model, TOKENIZER, precision=precision, max_length=12, keeps_memory=keeps_memory)
    stage = make_stage(model, make_config(precision=precision), sampler=sampler)
    options = {"num_samples": 4, "max_new_tokens": 5, "temperature": 0.8, "seeds": [3, 4, 5]}
    stage.config.temperature = 0.8
    tolerance = CACHED_EQUALS_PLAIN if precision == "float32" else 0.05
    texts = []
    for shift in (0.0, 2.0):
        with torch.no_grad():
            model.model.norm.weight.add_(shift)
        groups = sampler.sample(prompts, **options)
        rollouts = [Rollout(prompt, sample, 1.0) for prompt, group in zip(prompts, groups) for sample in group]
        batch = pack_rollouts(rollouts)
        expected = stage._log_probs(model, batch.packed)
        assert (batch.tokens.sampler_log_probs - expected).abs().max() < tolerance
        assert [[s.token_ids for s in group] for group in sampler.sample(prompts, **options)] == [
            [s.token_ids for s in group] for group in groups
        ]
        for sample in (sample for group in groups for sample in group):
            assert sample.is_truncated == (sample.token_ids[-1] != 0)
            assert sample.text == TOKENIZER.decode(sample.token_ids, skip_special_tokens=True)
        texts.append([sample.text for group in groups for sample in group])
    assert len(set(texts[0])) > 3
    assert texts[0] != texts[1]


def test_a_run_with_the_engine_resumes_to_the_same_weights(tmp_path):
    class Failing(RewardExactly):
        calls = 0

        def score_many(self, problems, completions):
            Failing.calls += 1
            if Failing.calls == 4:
                raise RuntimeError("lost")
            return super().score_many(problems, completions)

    models = []
    for out, scorers in (("whole", [RewardExactly()]), ("parts", [Failing(), RewardExactly()])):
        config = make_config(steps=5, checkpoint_every=2, out=str(tmp_path / out), updates_per_step=2, samples_per_problem=12)
        for scorer in scorers:
            model = make_model()
            directory = RunDirectory("grpo", config)
            directory.create()
            try:
                grpo(model, TOKENIZER, PROBLEMS, config, scorer=scorer, directory=directory, progress=False)
            except RuntimeError:
                assert isinstance(scorer, Failing)
        models.append(model)
    assert Failing.calls == 4
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
    assert not torch.equal(models[0].model.norm.weight, make_model().model.norm.weight)


def test_problems_can_be_chosen_by_how_often_they_were_solved():
    rates = [0.0, 0.05, 0.1, 0.5, 0.9, 1.0]
    problems = [Problem(str(rate), "a", "b", metadata={"pass_rate": rate}) for rate in rates] + [Problem("new", "a", "b")]
    chosen = within_pass_rates(problems, make_config(pass_rates=(0.1, 0.9)))
    assert [problem.id for problem in chosen] == ["0.1", "0.5", "0.9", "new"]
    assert within_pass_rates(problems, make_config()) == problems
    with pytest.raises(ValueError, match=r"no problem has a share of correct samples within --pass-rates 0.6 0.8"):
        within_pass_rates(problems[:-1], make_config(pass_rates=(0.6, 0.8)))


def test_problems_come_in_seeded_epochs_and_resume():
    stream = ProblemStream(PROBLEMS, seed=1)
    drawn = [problem.id for problem in stream.next_problems(30)]
    epochs = [drawn[i : i + 3] for i in range(0, 30, 3)]
    assert all(sorted(epoch) == ["0", "1", "2"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    first, second = ProblemStream(PROBLEMS, seed=1), ProblemStream(PROBLEMS, seed=1)
    head = first.next_problems(7)
    second.load_state_dict(first.state_dict())
    assert [problem.id for problem in head + second.next_problems(23)] == drawn
    with pytest.raises(ValueError, match="not the problems"):
        ProblemStream(PROBLEMS[:2], seed=1).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples_per_problem": 1}, "--samples-per-problem: expected at least 2, got 1"),
        ({"pass_rates": (0.9, 0.1)}, "--pass-rates: expected two shares, the smaller first"),
        ({"refill": 0.5}, "--refill: expected at least 1, got 0.5"),
        ({"overlong_buffer": 4}, "--overlong-buffer: expected at most --max-new-tokens 3, got 4"),
        ({"temperature": 0.0}, "--temperature: expected more than 0"),
        ({"max_new_tokens": 20}, "--max-new-tokens 20 leaves no room for a prompt within --max-length 20"),
        ({"max_new_tokens": 19, "suffix": " a"}, "no problem's prompt leaves room"),
    ],
)
def test_settings_that_can_not_work_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        grpo(make_model(), TOKENIZER, PROBLEMS, make_config(**fields), scorer=RewardExactly())
