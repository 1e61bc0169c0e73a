"""On-policy distillation: no gradient between equals, the KL of what the student itself writes, and its fall."""

import json

import pytest
import torch
import torch.nn.functional as F

from m1.config import OnPolicyConfig
from m1.modeling import SequenceLayout
from m1.modeling.loading import load_model
from m1.training import on_policy as on_policy_module
from m1.training.loop import _accumulate
from m1.training.metrics import read_metrics
from m1.training.on_policy import OnPolicyStage, distill_on_policy
from m1.training.optimizer import select_trainable
from m1.training.rollouts import EngineSampler, Sample
from m1.training.sources import read_prompts
from tests.numerics import CHUNKED_LOSS
from tests.training import tiny

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def make_config(**fields):
    defaults = {
        "steps": 15,
        "problems_per_step": 4,
        "samples_per_problem": 4,
        "max_new_tokens": 6,
        "tokens_per_batch": 60,
        "max_length": 20,
        "learning_rate": 1e-2,
        "mixer_learning_rate": 1e-2,
        "warmup_steps": 2,
        "precision": "float32",
    }
    return OnPolicyConfig(**defaults | fields)


def make_stage(student, teacher, **fields):
    config = make_config(**fields)
    sampler = EngineSampler(student, None, precision=config.precision, max_length=20)
    return OnPolicyStage(student, teacher, PROMPTS, config, sampler=sampler), config


@pytest.mark.parametrize(("mixer", "kl"), [("mamba1", "forward"), ("mamba2", "reverse")])
def test_the_student_comes_nearer_on_its_own_samples(mixer, kl):
    student = tiny.model(mixer, attention=(2,), layers=3)
    teacher = tiny.teacher_of(student)
    result = distill_on_policy(student, teacher, None, PROMPTS, make_config(kl=kl), progress=False)
    assert result.metrics[0]["kl"] > 0.15
    assert result.last["kl"] < 0.4 * result.metrics[0]["kl"]
    assert {"entropy", "length", "truncated", "seconds_sampling", "seconds_training"} <= result.last.keys()


def test_between_equals_there_is_no_gradient():
    student, teacher = tiny.model("mamba2"), tiny.model("mamba2")
    select_trainable(student, [])
    stage, config = make_stage(student, teacher)
    (batches,) = stage.draw(0).updates
    sums, norm = _accumulate(student, stage, batches, config)
    assert abs(sums["kl"]) < 1e-4
    assert norm < 1e-5
    with torch.no_grad():
        teacher.model.norm.weight.add_(0.3)  # and there is one between others
    assert _accumulate(student, stage, batches, config)[1] > 1e-2


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_the_loss_is_the_divergence_at_the_sampled_tokens(kl):
    student = tiny.model("mamba2")
    teacher = tiny.teacher_of(student)

    class TwoSamples:
        def sample(self, prompts, **options):
            return [[Sample([11, 0], [-1.0, -2.0], "", False), Sample([12, 13], [-1.0, -1.0], "", True)] for _ in prompts]

    config = make_config(problems_per_step=1, samples_per_problem=2, kl=kl)
    stage = OnPolicyStage(student, teacher, PROMPTS[:1], config, sampler=TwoSamples())
    step = stage.draw(0)
    (batches,) = step.updates
    assert step.metrics["entropy"] == 1.25
    assert (step.metrics["length"], step.metrics["truncated"]) == (2.0, 0.5)
    found, _ = _accumulate(student, stage, batches, config)
    expected = 0.0
    for completion in ([11, 0], [12, 13]):
        ids = torch.tensor(PROMPTS[0] + completion)
        layout = SequenceLayout.from_lengths([len(ids)])
        p, q = (F.log_softmax(m.lm_head(m.packed_states(ids, layout)), -1)[2:4].detach() for m in (student, teacher))
        p, q = (p, q) if kl == "reverse" else (q, p)
        expected += (p.exp() * (p - q)).sum().item()
    assert found["kl"] == pytest.approx(expected, rel=CHUNKED_LOSS * 10)


def test_it_samples_from_the_student_as_it_is():
    student = tiny.model("mamba2")
    stage, _ = make_stage(student, tiny.teacher_of(student))
    first = [batch.input_ids.tolist() for batch in stage.draw(0).updates[0]]
    stage.load_state_dict({"position": 0, "problems": 4})
    assert [batch.input_ids.tolist() for batch in stage.draw(0).updates[0]] == first
    stage.load_state_dict({"position": 0, "problems": 4})
    with torch.no_grad():
        student.model.norm.weight.mul_(-1)
    assert [batch.input_ids.tolist() for batch in stage.draw(0).updates[0]] != first


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    hybrid = tiny.model("mamba2", vocab_size=259)
    teacher = tiny.model("mamba2", attention=(0, 1), vocab_size=259)
    for name, model in (("hybrid", hybrid), ("teacher", teacher)):
        model.save_pretrained(root / name)
        tiny.byte_tokenizer().save_pretrained(root / name)
    rows = [{"problem": f"{a}+1=", "answer": str(a + 1)} for a in range(5)] + [{"prompt": "0+1=", "completion": "one"}]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_the_command(directories, capsys):
    root = directories
    config = make_config(
        model=str(root / "hybrid"),
        teacher=str(root / "teacher"),
        out=str(root / "out"),
        data=[str(root / "sums.jsonl")],
        steps=2,
        device="cpu",
        max_length=100,
        tokens_per_batch=200,
        suffix="",
    )
    on_policy_module.run(config)
    printed = capsys.readouterr().out
    assert "5 prompts (0 too long), 4 × 4 samples of up to 6 tokens a step" in printed
    assert len(read_metrics(root / "out" / "metrics.jsonl")) == 2
    assert load_model(root / "out").config.mixer == "mamba2"
    config.out = str(root / "other")
    config.max_new_tokens = 100
    with pytest.raises(ValueError, match="leaves no room for a prompt within --max-length 100"):
        on_policy_module.run(config)
    assert not (root / "other").exists()


def test_prompts_stand_once(directories, tmp_path):
    path = str(directories / "sums.jsonl")
    assert read_prompts([path], num_problems=1, seed=0, suffix=" !") == [*(f"{a}+1= !" for a in range(5)), "0+1="]
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    chats.write_text(json.dumps({"messages": turns[:2]}) + "\n")
    assert read_prompts([str(chats)], num_problems=1, seed=0, suffix=" !") == ["user"]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ValueError, match="line 1: expected a user's message and an assistant's"):
        read_prompts([str(chats)], num_problems=1, seed=0, suffix="")
