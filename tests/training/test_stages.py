"""The stages: each lowers its own loss, sees what it should see, and refuses what can't work; the commands end to end."""

import json

import pytest
import torch
import torch.nn.functional as F

from m1.config import AlignConfig, DistillConfig, GRPOConfig, OnPolicyConfig, SFTConfig
from m1.modeling.loading import load_model
from m1.storage import read_run_record
from m1.training import align as align_module
from m1.training import command
from m1.training import distill as distill_module
from m1.training import grpo as grpo_module
from m1.training import sft as sft_module
from m1.training.align import AlignStage, align
from m1.training.distill import DistillStage, compare, distill
from m1.training.loop import _accumulate, train
from m1.training.losses import target_states
from m1.training.metrics import read_metrics
from m1.training.on_policy import OnPolicyStage
from m1.training.optimizer import group_of, select_trainable
from m1.training.packing import pack
from m1.training.rollouts import EngineSampler
from m1.training.run_directory import RunDirectory
from m1.training.sft import SFTStage, sft
from tests.numerics import REL_RMS, rel_rms
from tests.training import ranks, tiny


class Lost(RuntimeError):
    """What ends a run in the middle."""


FAST = {"tokens_per_step": 80, "tokens_per_batch": 40, "max_length": 30, "warmup_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(params=["mamba1", "mamba2"])
def student(request):
    return tiny.model(request.param, attention=(2,), layers=3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sft_fits_its_documents(student, precision):
    documents = tiny.documents(8)
    result = sft(student, documents, SFTConfig(steps=15, precision=precision, **FAST), progress=False)
    assert result.metrics[0]["loss"] > 3
    assert result.last["loss"] < 0.5 * result.metrics[0]["loss"]
    assert all(p.grad is None for p in student.parameters())
    assert not student.training


def test_the_loss_is_the_models_own_on_the_same_labels(student):
    documents, stage = tiny.documents(4), SFTStage(student, tiny.documents(4), SFTConfig(**FAST))
    expected = 0.0
    for document in documents:
        ids = torch.from_numpy(document.token_ids).long()
        labels = ids.masked_fill(~torch.from_numpy(document.is_target), -100)
        loss = student(input_ids=ids[None], labels=labels[None], use_cache=False).loss
        expected += loss.item() * document.num_targets
    assert stage.backward(pack(documents), 1)["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_align_brings_the_mixers_to_the_teacher(student, precision):
    teacher = tiny.teacher_of(student)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    config = AlignConfig(steps=30, mixer_learning_rate=2e-2, precision=precision, **FAST | {"learning_rate": 0.0})
    result = align(student, teacher, tiny.documents(8), config, progress=False)
    assert result.last["loss"] < 0.4 * result.metrics[0]["loss"]
    for layer in (0, 1):
        assert result.last[f"error_{layer}"] < 0.7 * result.metrics[0][f"error_{layer}"]
    assert "error_2" not in result.last
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == (group_of(name) != "mixers"), name
    assert all(p.grad is None for p in teacher.parameters())


def test_align_sees_the_teachers_own_inputs_and_outputs():
    student = tiny.model(attention=(2,), layers=3)
    teacher = tiny.teacher_of(student)
    batch = pack(tiny.documents(5))
    config = AlignConfig(precision="float32", **FAST)
    stage = AlignStage(student, teacher, tiny.documents(5), config)
    stage.draw(0)
    sums, _ = _accumulate_mixers(student, stage, [batch], config)
    # The same by hand: the teacher's residual stream, layer by layer.
    model, errors = teacher.model, {}
    with torch.no_grad():
        hidden, rotary = model.embed_tokens(batch.input_ids), model.rotary(batch.layout.positions)
        for index, block in enumerate(model.layers):
            x = block.input_layernorm(hidden)
            wanted = block.self_attn(x, batch.layout, rotary)
            if index < 2:
                given = student.model.layers[index].mixer(x, batch.layout, rotary)
                errors[index] = (F.mse_loss(given, wanted) / wanted.square().mean()).sqrt().item()
                assert sums[f"squared_signal_{index}"] == pytest.approx(wanted.square().mean(-1).sum().item(), rel=1e-5)
            hidden = hidden + wanted
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    found = stage.summarise(sums, batch.num_tokens)
    assert [found["error_0"], found["error_1"]] == pytest.approx([errors[0], errors[1]], rel=1e-4)


def _accumulate_mixers(student, stage, batches, config):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(group_of(name) == "mixers")
    return _accumulate(student, stage, batches, config)


@pytest.mark.parametrize("make", [AlignStage, DistillStage])
def test_an_accumulated_gradient_is_the_large_batchs(make):
    student = tiny.model(attention=(2,), layers=3)
    teacher, documents = tiny.teacher_of(student), tiny.documents(9)
    config = (AlignConfig if make is AlignStage else DistillConfig)(precision="float32", **FAST)
    stage = make(student, teacher, documents, config)
    stage.draw(0)
    for_stage = align_module._with_all_positions if make is AlignStage else (lambda batch: batch)
    whole, _ = _accumulate_mixers(student, stage, [for_stage(pack(documents))], config)
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad}
    parts = [for_stage(pack(part)) for part in (documents[:1], documents[1:6], documents[6:])]
    sums, _ = _accumulate_mixers(student, stage, parts, config)
    assert sums["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for name, gradient in expected.items():
        assert rel_rms(student.get_parameter(name).grad, gradient) < REL_RMS[torch.float32], name


@pytest.mark.parametrize(("precision", "kl"), [("float32", "forward"), ("float32", "reverse"), ("bfloat16", "forward")])
def test_distill_brings_the_student_to_the_teacher(student, precision, kl):
    teacher, documents = tiny.teacher_of(student), tiny.documents(8)
    teacher.to(getattr(torch, precision))
    before = compare(student, teacher, documents, precision=precision)
    config = DistillConfig(steps=20, precision=precision, kl=kl, mixer_learning_rate=1e-2, **FAST)
    result = distill(student, teacher, documents, config, progress=False)
    after = compare(student, teacher, documents, precision=precision)
    assert result.last["kl"] < 0.3 * result.metrics[0]["kl"]
    assert after["kl"] < 0.3 * before["kl"]
    assert after["agreement"] > before["agreement"]


def test_compare_is_the_naive_comparison():
    student = tiny.model()
    teacher, documents = tiny.teacher_of(student), tiny.documents(5)
    batch = pack(documents)
    with torch.no_grad():
        p, q = (F.log_softmax(h @ w.T, -1) for h, w in (target_states(m, batch) for m in (teacher, student)))
    found = compare(student, teacher, documents, tokens_per_batch=20, precision="float32")
    assert found["targets"] == batch.num_targets
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert found["ce"] == pytest.approx(F.nll_loss(q, batch.targets).item(), rel=1e-5)
    assert compare(teacher, teacher, documents, precision="float32")["agreement"] == 1.0


def test_teachers_that_do_not_fit_are_refused():
    student, documents = tiny.model(), tiny.documents(3)
    with pytest.raises(ValueError, match="vocabulary of 66 tokens, the student one of 67"):
        distill(student, tiny.model(vocab_size=66), documents, DistillConfig(**FAST))
    with pytest.raises(ValueError, match="hidden_size 48, the student 32"):
        align(student, tiny.model(hidden_size=48, num_attention_heads=3), documents, AlignConfig(**FAST))
    with pytest.raises(ValueError, match="num_hidden_layers 3, the student 2"):
        align(student, tiny.model(layers=3), documents, AlignConfig(**FAST))
    with pytest.raises(ValueError, match="no layer of it is a mixer"):
        align(tiny.model(attention=(0, 1)), student, documents, AlignConfig(**FAST))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A hybrid and its teacher on disk, with a tokenizer, and data of each kind."""
    root = tmp_path_factory.mktemp("models")
    hybrid = tiny.model("mamba2", vocab_size=259)
    teacher = tiny.model("mamba2", attention=(0, 1), vocab_size=259)
    for name, model in (("hybrid", hybrid), ("teacher", teacher)):
        model.save_pretrained(root / name)
        tiny.byte_tokenizer().save_pretrained(root / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def options(root, name, **fields):
    common = {"model": str(root / "hybrid"), "out": str(root / name), "data": [str(root / "sums.jsonl")], "steps": 2}
    sizes = {"tokens_per_step": 200, "tokens_per_batch": 100, "max_length": 100, "device": "cpu", "dtype": "float32"}
    return common | sizes | fields


def test_the_commands_one_after_the_other(directories, capsys):
    root = directories
    teacher = {"teacher": str(root / "teacher")}
    align_module.run(AlignConfig(**options(root, "aligned", **teacher)))
    distill_module.run(DistillConfig(**options(root, "distilled", model=str(root / "aligned"), **teacher)))
    sft_module.run(SFTConfig(**options(root, "tuned", model=str(root / "distilled"))))
    printed = capsys.readouterr().out
    assert "25 documents, " in printed
    assert f"Next: m1 distill --model {root / 'aligned'} --teacher {root / 'teacher'}" in printed
    assert f"The model is in {root / 'tuned'}" in printed
    record = read_run_record(root / "tuned")
    assert [step["command"] for step in record["history"]] == ["align", "distill"]
    assert record["metrics"]["loss"] == read_metrics(root / "tuned" / "metrics.jsonl")[-1]["loss"]
    # Trained on from where the stage before it ended; alignment touched the mixers alone.
    hybrid, aligned, tuned = (load_model(root / name) for name in ("hybrid", "aligned", "tuned"))
    for name, parameter in hybrid.named_parameters():
        assert torch.equal(parameter, aligned.get_parameter(name)) == (group_of(name) != "mixers")
    assert not torch.equal(aligned.model.norm.weight, tuned.model.norm.weight)

    sft_module.run(SFTConfig(**options(root, "tuned", model=str(root / "distilled"))))
    assert "is finished already" in capsys.readouterr().out


def test_grpo_from_the_command_with_the_engine_and_checked_answers(directories, capsys):
    config = GRPOConfig(
        **options(directories, "reinforced", data=["gym:chain_sum"], num_problems=4, max_length=300, tokens_per_batch=600),
        problems_per_step=2,
        samples_per_problem=2,
        max_new_tokens=6,
        precision="float32",
        suffix="",
    )
    grpo_module.run(config)
    assert "4 problems (0 too easy, hard or long), 2 × 2 = 4 samples of up to 6 tokens a step" in capsys.readouterr().out
    records = read_metrics(directories / "reinforced" / "metrics.jsonl")
    assert all({"reward", "pass_at_1", "pass_at_k", "truncated", "dropped_groups"} <= record.keys() for record in records)
    assert load_model(directories / "reinforced").config.mixer == "mamba2"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": ""}, ValueError, "--model is needed"),
        ({"data": []}, ValueError, "--data is needed"),
        ({"model": "/nowhere/model"}, FileNotFoundError, "/nowhere/model"),
        ({"data": ["/nowhere/data.jsonl"]}, FileNotFoundError, "/nowhere/data.jsonl: no such data file"),
        ({"max_length": 101}, ValueError, "--max-length 101 does not fit into --tokens-per-batch 100"),
        ({"steps": 0}, ValueError, "--steps: expected at least 1, got 0"),
        ({"ema_decay": 1.0}, ValueError, "--ema-decay: expected 0 .* got 1.0"),
        ({"timeout": 0.0}, ValueError, "--timeout: expected more than 0 seconds"),
        ({"export_every": -1}, ValueError, "--export-every: expected 0 .* got -1"),
        ({"device": "cuda"}, ValueError, "no CUDA GPU"),
        ({"frozen": ["mixers", "attention", "mlp", "norms", "embeddings"]}, ValueError, "leaves no parameter"),
    ],
)
def test_bad_input_leaves_nothing(directories, fields, error, message):
    if fields.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        sft_module.run(SFTConfig(**options(directories, "bad", **fields)))
    assert not (directories / "bad").exists()


def test_too_little_memory_or_disk_is_said_before_anything_is_written(directories, monkeypatch):
    monkeypatch.setattr("m1.storage.available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"training .*hybrid \(lower --tokens-per-batch.*GiB are available"):
        sft_module.run(SFTConfig(**options(directories, "bad")))
    monkeypatch.undo()
    monkeypatch.setattr("m1.storage.shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"m1 sft needs .* GiB on the disk"):
        sft_module.run(SFTConfig(**options(directories, "bad")))
    assert not (directories / "bad").exists()


def test_a_resumed_run_needs_room_only_for_what_is_not_there_yet(directories, monkeypatch):
    draw = SFTStage.draw

    def draw_or_be_lost(stage, step):
        if step == 1:
            raise Lost
        return draw(stage, step)

    fields = options(directories, "resumed", checkpoint_every=1)
    monkeypatch.setattr(SFTStage, "draw", draw_or_be_lost)
    with pytest.raises(Lost):
        sft_module.run(SFTConfig(**fields))
    monkeypatch.undo()
    model = sum(p.numel() for p in load_model(directories / "hybrid").parameters()) * 4
    free = 1.05 * (2.5 * 3 + 1) * model  # a checkpoint is three times the model, and there is one of the three
    monkeypatch.setattr("m1.storage.shutil.disk_usage", lambda place: type("Usage", (), {"free": free}))
    with pytest.raises(OSError, match=r"m1 sft needs .* GiB on the disk"):
        sft_module.run(SFTConfig(**options(directories, "anew")))
    sft_module.run(SFTConfig(**fields))
    assert load_model(directories / "resumed").config.mixer == "mamba2"


def test_teachers_of_another_tokenizer_are_refused(directories, tmp_path):
    tiny.model("mamba2", attention=(0, 1), vocab_size=259).save_pretrained(tmp_path / "other")
    other = tiny.byte_tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another tokenizer"):
        distill_module.run(DistillConfig(**options(directories, "bad", teacher=str(tmp_path / "other"))))
    with pytest.raises(ValueError, match="--teacher is needed"):
        distill_module.run(DistillConfig(**options(directories, "bad")))
    assert not (directories / "bad").exists()


def test_memory_estimate_counts_the_model_once(directories):
    model = load_model(directories / "hybrid")
    assert command.parameter_bytes(model.config, 1) == sum(p.numel() for p in model.parameters())


def run_stage(name, out, *, lost_at=None):
    """5 steps of a stage in the directory `out`, from where it stands to where it is lost: the model."""
    sizes = {"tokens_per_step": 60, "tokens_per_batch": 30, "max_length": 30, "precision": "float32", "checkpoint_every": 2}
    common = sizes | {"out": str(out), "steps": 5, "mixer_learning_rate": 1e-2, "warmup_steps": 1}
    student = tiny.model(attention=(1,), layers=3)
    teacher, documents = tiny.teacher_of(student), tiny.documents(20)
    if name == "align":
        config, frozen = AlignConfig(**common), align_module.FROZEN
        stage = AlignStage(student, teacher, documents, config)
    elif name == "distill":
        config, frozen = DistillConfig(**common), []
        stage = DistillStage(student, teacher, documents, config)
    else:
        config, frozen = OnPolicyConfig(**common, problems_per_step=3, max_new_tokens=5), []
        sampler = EngineSampler(student, None, precision="float32", max_length=20)
        stage = OnPolicyStage(student, teacher, ranks.PROMPTS, config, sampler=sampler)
    draw = stage.draw

    def draw_or_be_lost(step):
        if step == lost_at:
            raise Lost
        return draw(step)

    stage.draw = draw_or_be_lost
    select_trainable(student, frozen)
    directory = RunDirectory(name, config)
    directory.create()
    train(student, stage, config, directory=directory, progress=False)
    return student


@pytest.mark.parametrize("name", ["align", "distill", "on-policy"])
def test_resumed_is_uninterrupted(name, tmp_path):
    """To the bit; what a stage measured at its first step, as alignment does, is not measured anew."""
    whole = run_stage(name, tmp_path / "whole")
    with pytest.raises(Lost):
        run_stage(name, tmp_path / "parts", lost_at=3)
    resumed = run_stage(name, tmp_path / "parts")
    start = tiny.model(attention=(1,), layers=3)
    for key, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(key)), key
    assert not torch.equal(whole.model.layers[0].mixer.out_proj.weight, start.model.layers[0].mixer.out_proj.weight)
    losses = [[record["loss"] for record in read_metrics(tmp_path / out / "metrics.jsonl")] for out in ("whole", "parts")]
    assert losses[0] == losses[1]
