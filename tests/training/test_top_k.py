"""A teacher by its k most probable tokens: exact where k is the vocabulary, gradients by autograd where it is not; on disk."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m1.config import DistillConfig
from m1.training import distill as distill_module
from m1.training.distill import compare, distill
from m1.training.losses import Divergence, head_loss, target_states
from m1.training.metrics import read_metrics
from m1.training.packing import Document, pack
from m1.training.teacher_cache import CachedTeacher, TeacherCache, hash_of, hashes_of
from m1.training.top_k import TopK, TopKDivergence, TopKRecorder
from tests.numerics import CHUNKED_LOSS, REL_RMS, rel_rms
from tests.training import tiny

VOCABULARY, TOKENS = 67, 23


def heads(seed=0):
    """Student and teacher: hidden states and a head each; logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    student = (make(TOKENS, 16).requires_grad_(), make(VOCABULARY, 16).div(2).requires_grad_())
    return student, (make(TOKENS, 12), make(VOCABULARY, 12).div(2)), torch.arange(TOKENS) % VOCABULARY


def record(teacher, k, temperature=1.0):
    recorder = TopKRecorder(TOKENS, k, temperature, torch.device("cpu"))
    with torch.no_grad():
        mass = head_loss(recorder, teacher)["mass"]
    assert mass == pytest.approx(recorder.found.log_probs.exp().sum().item(), rel=1e-6)
    return recorder.found


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (0.7, 0.0), (1.0, 0.3), (1.5, 0.3)])
def test_with_the_whole_vocabulary_it_is_exact(kind, temperature, ce_weight):
    options = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight}
    student, teacher, targets = heads()
    expected = head_loss(Divergence(targets, **options), student, teacher)
    wanted = torch.autograd.grad(expected["loss"], student)
    found = head_loss(TopKDivergence(record(teacher, VOCABULARY, temperature), targets, **options), student)
    for name in ("loss", "kl", "ce"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=CHUNKED_LOSS * 10), name
    for mine, theirs in zip(torch.autograd.grad(found["loss"], student), wanted, strict=True):
        assert rel_rms(mine, theirs) < REL_RMS[torch.float32]


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (0.7, 0.4)])
@pytest.mark.parametrize("k", [1, 8])
def test_k_tokens_and_the_rest_against_autograd(kind, temperature, ce_weight, k):
    student, teacher, targets = heads()
    recorded = record(teacher, k, temperature)
    logits = student[0] @ student[1].T
    p = F.softmax(teacher[0] @ teacher[1].T / temperature, -1)
    q = F.softmax(logits / temperature, -1)
    ids = p.topk(k).indices
    assert torch.equal(recorded.ids.long(), ids)
    p, q = (torch.cat([t.gather(1, ids), 1 - t.gather(1, ids).sum(1, keepdim=True)], 1) for t in (p, q))
    kl = (p * (p / q).log()).sum() if kind == "forward" else (q * (q / p).log()).sum()
    ce = F.cross_entropy(logits, targets, reduction="sum")
    expected = (1 - ce_weight) * kl + ce_weight * ce
    wanted = torch.autograd.grad(expected, student)
    loss = TopKDivergence(recorded, targets, kind=kind, temperature=temperature, ce_weight=ce_weight)
    found = head_loss(loss, student)
    assert found["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found["loss"], student), wanted, strict=True):
        assert rel_rms(mine, theirs) < 10 * REL_RMS[torch.float32]  # 1 - sum of k probabilities loses digits in the naive form


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_more_tokens_say_more_and_the_whole_says_all(kind):
    student, teacher, targets = heads()
    kls = [head_loss(TopKDivergence(record(teacher, k), targets, kind=kind), student)["kl"].item() for k in (1, 4, 16, 64)]
    whole = head_loss(Divergence(kind=kind), student, teacher)["kl"].item()
    assert kls == sorted(kls)
    assert 0 < kls[0] < 0.9 * whole
    assert kls[-1] < whole * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_student_that_is_quite_wrong_still_learns(kind):
    """Probabilities far below what fp32 holds: finite numbers, and a gradient that points to the teacher's token."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3] = 500.0
    recorded = TopK(torch.tensor([[5]], dtype=torch.int32), torch.tensor([[-1e-4]]), torch.tensor([-9.2]))
    sums, gradient = TopKDivergence(recorded, torch.tensor([5]), kind=kind)(logits, None, slice(0, 1), True)
    assert sums.isfinite().all() and gradient.isfinite().all()
    assert sums[1] > 5
    if kind == "reverse":  # there, the gradient of a token is weighed by its probability
        return
    logits[0, 3] = 60.0
    _, gradient = TopKDivergence(recorded, torch.tensor([5]), kind=kind)(logits, None, slice(0, 1), True)
    assert gradient[0, 5] < -0.9 and gradient[0, 3] > 0.9


# The cache


def describe(k, **changed):
    return {"teacher": "t", "vocab_size": VOCABULARY, "top_k": k, "temperature": 1.0} | changed


def cached(teacher, directory, k=8, **options):
    """A cached teacher, and how often it was loaded."""
    loads = []

    def load():
        loads.append(1)
        return teacher

    cache = TeacherCache(directory, describe(k), **options)
    return CachedTeacher(load, teacher.config, cache, temperature=1.0, precision="float32"), loads


def test_what_was_said_once_is_read_in_any_order(tmp_path):
    teacher, documents = tiny.model(attention=(0, 1)), tiny.documents(6)
    said, loads = cached(teacher, tmp_path / "cache", dtype=np.float32)
    first = said.say(pack(documents[:4]))
    expected = TopKRecorder(first.num_targets, 8, 1.0, torch.device("cpu"))
    with torch.no_grad():
        head_loss(expected, target_states(teacher, pack(documents[:4])))
    for name in ("ids", "log_probs", "log_tail"):
        assert torch.equal(getattr(first.teacher, name), getattr(expected.found, name)), name
    assert loads == [1]
    said.say(pack(documents[3:]))
    again, loads = cached(teacher, tmp_path / "cache", dtype=np.float32)
    order = [5, 0, 3, 2]
    batch = again.say(pack([documents[i] for i in order]))
    counts = [document.num_targets for document in documents]
    starts = np.cumsum([0, *counts])
    assert torch.equal(
        batch.teacher.log_probs[counts[5] : counts[5] + counts[0]], first.teacher.log_probs[starts[0] : starts[1]]
    )
    assert loads == [], "nobody was asked again"
    assert again.cache.num_missing(documents) == 0
    assert again.cache.num_missing([Document(documents[0].token_ids, ~documents[0].is_target)]) > 0, "other targets are others"


def test_hashes_of_a_batch_are_those_of_its_documents():
    documents = [*tiny.documents(4), Document(np.array([1, 2], dtype=np.int32), np.array([True, True]))]
    assert hashes_of(pack(documents)) == [hash_of(document) for document in documents]
    assert len(set(hashes_of(pack(documents)))) == 5


@pytest.mark.parametrize("part", ["ids", "log_probs", "tails", "index"])
def test_what_a_kill_cut_off_was_never_there(part, tmp_path):
    teacher, documents = tiny.model(attention=(0, 1)), tiny.documents(6)
    whole, _ = cached(teacher, tmp_path / "whole")
    expected = whole.say(pack(documents))
    said, _ = cached(teacher, tmp_path / "cut")
    for document in documents[:3]:
        said.say(pack([document]))
    path = tmp_path / "cut" / f"{part}-00000.bin"
    del said
    path.write_bytes(path.read_bytes()[:-3])
    again, loads = cached(teacher, tmp_path / "cut")
    assert again.cache.num_missing(documents[:3]) == documents[2].num_targets
    found = again.say(pack(documents))
    assert loads == [1]
    assert torch.equal(found.teacher.ids, expected.teacher.ids)
    torch.testing.assert_close(found.teacher.log_probs, expected.teacher.log_probs, rtol=2e-3, atol=1e-3)  # rounded to fp16


def test_a_cache_of_something_else_is_refused(tmp_path):
    TeacherCache(tmp_path / "cache", describe(8))
    with pytest.raises(ValueError, match="made with top_k 8, not 9"):
        TeacherCache(tmp_path / "cache", describe(9))
    with pytest.raises(ValueError, match="made with teacher t, not u"):
        TeacherCache(tmp_path / "cache", describe(8, teacher="u"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no teacher's cache"):
        TeacherCache(tmp_path / "other", describe(8))


def test_two_runs_at_once_share_what_was_there_and_write_apart(tmp_path):
    teacher, documents = tiny.model(attention=(0, 1)), tiny.documents(6)
    cached(teacher, tmp_path / "cache")[0].say(pack(documents[:2]))
    runs = [cached(teacher, tmp_path / "cache") for _ in range(2)]
    for (said, _), some in zip(runs, (documents[:4], documents[3:]), strict=True):
        said.say(pack(some))
        assert said.cache.num_missing(documents[:2]) == 0
    del runs, said
    again, loads = cached(teacher, tmp_path / "cache")
    again.say(pack(documents))
    assert loads == []
    assert len(list((tmp_path / "cache").glob("index-*"))) == 2


# Distillation from it

FAST = {"tokens_per_step": 80, "tokens_per_batch": 40, "max_length": 30, "warmup_steps": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_distilling_from_a_whole_cache_is_distilling_from_the_teacher(kl, tmp_path):
    students = [tiny.model("mamba2", attention=(2,), layers=3) for _ in range(2)]
    teacher, documents = tiny.teacher_of(students[0]), tiny.documents(8)
    tiny.teacher_of(students[1])
    said, loads = cached(teacher, tmp_path / "cache", VOCABULARY, dtype=np.float32)
    config = DistillConfig(steps=6, precision="float32", kl=kl, mixer_learning_rate=1e-2, **FAST)
    runs = [
        distill(student, source, documents, config, progress=False)
        for student, source in zip(students, (teacher, said), strict=True)
    ]
    assert loads == [1]
    for plain, from_cache in zip(runs[0].metrics, runs[1].metrics, strict=True):
        assert from_cache["kl"] == pytest.approx(plain["kl"], rel=1e-3)


def test_eight_tokens_teach_too(tmp_path):
    student = tiny.model("mamba2", attention=(2,), layers=3)
    teacher, documents = tiny.teacher_of(student), tiny.documents(8)
    before = compare(student, teacher, documents, precision="float32")
    said, _ = cached(teacher, tmp_path / "cache")
    config = DistillConfig(steps=20, precision="float32", mixer_learning_rate=1e-2, **FAST)
    distill(student, said, documents, config, progress=False)
    assert compare(student, teacher, documents, precision="float32")["kl"] < 0.4 * before["kl"]


def test_the_command_asks_the_teacher_once(tmp_path, monkeypatch):
    hybrid = tiny.model("mamba2", vocab_size=259)
    for name, model in (("hybrid", hybrid), ("teacher", tiny.model("mamba2", attention=(0, 1), vocab_size=259, seed=1))):
        model.save_pretrained(tmp_path / name)
        tiny.byte_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loads, load = [], distill_module.load_teacher
    monkeypatch.setattr(distill_module, "load_teacher", lambda config: loads.append(1) or load(config))

    def run(out, **fields):
        options = {"data": [str(tmp_path / "sums.jsonl")], "teacher_top_k": 16, "precision": "float32", "device": "cpu"}
        paths = {"model": "hybrid", "teacher": "teacher", "out": out, "teacher_cache": "cache", "cache_dir": "documents"}
        paths = {key: str(tmp_path / name) for key, name in paths.items()}
        sizes = {"steps": 8, "tokens_per_step": 200, "tokens_per_batch": 100, "max_length": 100}
        distill_module.run(DistillConfig(**paths | options | sizes | fields))
        return [record["kl"] for record in read_metrics(tmp_path / out / "metrics.jsonl")]

    first = run("one")
    assert loads == [1]
    assert run("two") == first
    assert loads == [1], "the second run read what the first had asked"
    with pytest.raises(ValueError, match="made with top_k 16, not 8"):
        run("three", teacher_top_k=8)
    tiny.model("mamba2", attention=(0, 1), vocab_size=259, seed=2).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"made with teacher \w+, not"):
        run("three")
    with pytest.raises(ValueError, match="--shard-teacher: with --teacher-cache"):
        run("three", shard_teacher=True)
    with pytest.raises(ValueError, match="--teacher-top-k: expected at least 1, got 0"):
        run("three", teacher_top_k=0)
    assert not (tmp_path / "three").exists()
