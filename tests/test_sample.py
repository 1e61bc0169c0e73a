"""`m1 sample`: rows that training takes, each sample once however often it was killed, checked answers marked."""

import gzip
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from m1 import inventions
from m1 import sample as sample_module
from m1.config import SampleConfig
from m1.json_lines import BlockWriter, read_blocks
from m1.sample import run
from m1.storage import read_run_record
from m1.training.data import make_documents, user_prefix
from m1.training.sources import read_problem_set, read_rows
from tests.training import tiny

REWARD = "tests.reasoning.reward_functions:threes"


CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer():
    tokenizer = tiny.word_tokenizer("0 1 2 3 4 5 user assistant")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random, and of nine words, so that it says something with every digit in it soon."""
    path = tmp_path_factory.mktemp("model")
    built = tiny.model("mamba2", vocab_size=9)
    with torch.no_grad():
        built.model.embed_tokens.weight.mul_(0.25)
    built.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl.gz"
    rows = [{"id": f"p{number}", "problem": f"{number} 1", "answer": str(number)} for number in range(6)]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def config(model, problems, out, **fields):
    options = {"samples": 3, "max_new_tokens": 8, "device": "cpu", "suffix": " 2"}
    return SampleConfig(model=str(model), data=[str(problems)], out=str(out), **options | fields)


def rows_of(out, kind="samples"):
    return [row for path in sorted(out.glob(f"{kind}-*.jsonl.gz")) for row in read_blocks(path)[0]]


def keys_of(out):
    return [(row["id"], row["sample"]) for row in rows_of(out)]


def same_samples(one, other):
    order = lambda rows: sorted(rows, key=lambda row: (row["id"], row["sample"]))  # noqa: E731
    return order(rows_of(one)) == order(rows_of(other))


def test_every_sample_once_and_training_reads_it(model, problems, tmp_path, capsys):
    out = tmp_path / "out"
    run(config(model, problems, out, log_probs=True, reward=REWARD))
    rows = rows_of(out)
    assert sorted(keys_of(out)) == [(f"p{p}", s) for p in range(6) for s in range(3)]
    for row in rows:
        assert row["prompt"] == row["problem"] + " 2"
        assert row["is_correct"] is (None if "4" in row["completion"] else "3" in row["completion"])
        assert len(row["token_ids"]) == len(row["log_probs"]) == row["num_tokens"]
        assert all(value <= 0 for value in row["log_probs"])
    assert {row["is_correct"] for row in rows} == {True, False, None}
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    record = read_run_record(out)
    assert record["samples"] == 18
    assert record["correct"] == sum(row["is_correct"] is True for row in rows)
    assert "could not be computed" in capsys.readouterr().out

    read = read_rows([str(out)], num_problems=1, seed=0)
    assert len(read) == 18
    correct = read_rows([str(out)], num_problems=1, seed=0, only_correct=True)
    assert [row.fields["is_correct"] for row in correct] == [True] * record["correct"]
    for row, document in zip(rows, make_documents(read, word_tokenizer(), max_length=200), strict=True):
        completion = document.token_ids[document.is_target]
        assert completion.tolist() == row["token_ids"], "what was sampled is what is learnt: with its end, or without one"

    run(config(model, problems, out, log_probs=True, reward=REWARD))
    assert "finished already" in capsys.readouterr().out


class KilledError(Exception):
    pass


def stop_after(monkeypatch, num_problems, error):
    """From now on, sampling raises when so many problems are done."""
    complete = sample_module._complete

    def stopped(*arguments, **options):
        finished = complete(*arguments, **options)
        yield from itertools.islice(finished, num_problems)
        finished.close()
        raise error

    monkeypatch.setattr(sample_module, "_complete", stopped)


def test_a_killed_run_goes_on_without_gaps_or_doubles(model, problems, tmp_path, monkeypatch):
    run(config(model, problems, tmp_path / "whole"))
    out = tmp_path / "parts"
    for num_problems in (2, 3, 1):
        with monkeypatch.context() as patch:
            patch.setattr(sample_module, "BLOCK_PROBLEMS", 1)
            stop_after(patch, num_problems, KilledError())
            with pytest.raises(KilledError):
                run(config(model, problems, out))
        assert not (out / "m1_run.json").exists()
        with pytest.raises(ValueError, match="has not finished it"):
            read_rows([str(out)], num_problems=1, seed=0)
        [path] = out.glob("samples-*")
        path.write_bytes(path.read_bytes()[:-1])  # and the last block was torn
    assert len(keys_of(out)) == 3 * (1 + 2 + 0)
    run(config(model, problems, out))
    assert len(keys_of(out)) == len(set(keys_of(out))) == 18
    assert same_samples(out, tmp_path / "whole")


def test_samples_of_two_models_of_one_name_are_not_mixed(model, problems, tmp_path):
    """Trained further in the same place, after a run that was stopped."""
    place, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, place)
    run(config(place, problems, out, samples=1))
    weights = load_file(place / "model.safetensors")
    norm = next(name for name in weights if "norm" in name)
    save_file(weights | {norm: weights[norm] * 1.01}, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="begun with weights"):
        run(config(place, problems, out, samples=2))
    shutil.copytree(model, place, dirs_exist_ok=True)
    run(config(place, problems, out, samples=2))
    assert len(rows_of(out)) == 12


def test_what_was_finished_when_interrupted_is_kept(model, problems, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(config(model, problems, tmp_path / "out"))
    assert len(keys_of(tmp_path / "out")) == 3 * 4


@pytest.mark.parametrize("number", [3, 6])
def test_a_disk_that_fills_up_ends_the_run_and_loses_one_block(model, problems, tmp_path, monkeypatch, number):
    append, blocks = BlockWriter.append, []

    def full(writer, rows):
        blocks.append(rows)
        if len(blocks) == number:
            raise OSError("samples-00000.jsonl.gz: can't write: No space left on device")
        append(writer, rows)

    with monkeypatch.context() as patch:
        patch.setattr(sample_module, "BLOCK_PROBLEMS", 1)
        patch.setattr(BlockWriter, "append", full)
        with pytest.raises(OSError, match="No space left"):
            run(config(model, problems, tmp_path / "out"))
    assert len(keys_of(tmp_path / "out")) == 3 * (number - 1)
    run(config(model, problems, tmp_path / "out"))
    assert len(set(keys_of(tmp_path / "out"))) == len(keys_of(tmp_path / "out")) == 18


def test_more_samples_are_added_to_those_that_are_there(model, problems, tmp_path):
    out = tmp_path / "out"
    run(config(model, problems, out, samples=2))
    before = rows_of(out)
    run(config(model, problems, out, samples=5))
    assert rows_of(out)[: len(before)] == before
    assert sorted(keys_of(out)) == [(f"p{p}", s) for p in range(6) for s in range(5)]
    texts = {(row["id"], row["sample"]): row["completion"] for row in rows_of(out)}
    repeated = [texts[f"p{p}", s] == texts[f"p{p}", s + 2] for p in range(6) for s in range(2)]
    assert not all(repeated), "later samples are the earlier ones again"
    with pytest.raises(ValueError, match=r"begun with temperature = 1.0, not 0.5"):
        run(config(model, problems, out, temperature=0.5))


def test_ranks_share_the_problems(model, problems, tmp_path, monkeypatch):
    run(config(model, problems, tmp_path / "one"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        assert not (tmp_path / "two" / "m1_run.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        run(config(model, problems, tmp_path / "two"))
    assert len(list((tmp_path / "two").glob("samples-*"))) == 2
    assert read_run_record(tmp_path / "two")["samples"] == 18
    assert same_samples(tmp_path / "one", tmp_path / "two")


def test_the_model_invents_problems(model, problems, tmp_path):
    assert user_prefix(tiny.byte_tokenizer()) == "<|im_start|>user\n"
    assert user_prefix(word_tokenizer()) == "user "
    assert user_prefix(tiny.byte_tokenizer(), "Count.") == "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\n"
    out = tmp_path / "out"
    settings = config(model, problems, out, invent=12, samples=2, max_new_tokens=6)
    settings.data = []
    run(settings)
    invented = rows_of(out, "problems")
    assert {row["id"] for row in invented} == {f"invented/0/{number}" for number in range(12)}
    texts = [row["problem"] for row in invented if row["problem"] is not None]
    assert len(texts) == len(set(texts)) > 2
    rows = rows_of(out)
    assert {row["prompt"] for row in rows} == set(texts), "an invented problem stands as it is, without the suffix"
    assert len(rows) == 2 * len(texts)
    assert all(row["is_correct"] is None and row["answer"] is None for row in rows)
    with pytest.raises(ValueError, match="no sample in it is correct"):
        read_rows([str(out)], num_problems=1, seed=0, only_correct=True)
    settings.invent = 14
    run(settings)
    assert rows_of(out, "problems")[:12] == invented


def test_invented_problems_are_answered_while_others_are_invented(model, problems, tmp_path, monkeypatch):
    """So that a run that is stopped leaves answers; each of a problem that is on disk, and none twice when it goes on."""
    out = tmp_path / "out"
    settings = config(model, problems, out, invent=400, samples=2, max_new_tokens=3)
    settings.data = []
    for error in (KilledError(), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(sample_module, "BLOCK_PROBLEMS", 4)
            patch.setattr(inventions, "BLOCK_INVENTIONS", 10**6)  # they are on disk by the time that answers are
            stop_after(patch, 220, error)
            with pytest.raises(type(error)):
                run(settings)
        texts = {row["id"]: row["problem"] for row in rows_of(out, "problems")}
        assert rows_of(out) and len(texts) < 400
        assert all(row["problem"] == texts[row["id"]] for row in rows_of(out))
    run(settings)
    texts = {row["id"]: row["problem"] for row in rows_of(out, "problems")}
    assert len(texts) == len(rows_of(out, "problems")) == 400
    expected = [(id_, sample) for id_, text in texts.items() if text is not None for sample in range(2)]
    assert sorted(keys_of(out)) == sorted(expected)


def test_samples_are_a_problem_set_again(model, tmp_path):
    """With what their rewards need, and how often they were solved; invented problems have no answer, so are none."""
    settings = config(model, "", tmp_path / "out", samples=4, invent=2, reward="auto")
    settings.data, settings.num_problems = ["gym:chain_sum"], 2
    run(settings)
    original = read_problem_set(["gym:chain_sum"], num_problems=2, seed=0)
    again = read_problem_set([str(tmp_path / "out")], num_problems=1, seed=0)
    assert sorted(problem.id for problem in again) == sorted(problem.id for problem in original)
    for problem in original:
        found = next(one for one in again if one.id == problem.id)
        assert (found.problem, found.answer, found.reward) == (problem.problem, problem.answer, problem.reward)
        assert found.metadata["entry"] == problem.metadata["entry"]
        correct = [row["is_correct"] for row in rows_of(tmp_path / "out") if row["id"] == problem.id]
        assert found.metadata["pass_rate"] == sum(correct) / 4


def test_a_sample_file_is_a_problem_set_only_where_ids_are_unique(problems, tmp_path):
    assert [problem.id for problem in read_problem_set([str(problems)], num_problems=1, seed=0)] == [f"p{n}" for n in range(6)]
    twice = config("nowhere", problems, tmp_path / "out")
    twice.data = [str(problems), str(problems)]
    with pytest.raises(ValueError, match="the id 'p0' stands for two problems"):
        sample_module._read_problems(twice)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "--samples: expected at least 1, got 0"),
        ({"temperature": 0.0}, "--temperature: expected more than 0, so that samples differ"),
        ({"invent": -1}, "--invent: expected 0 or more"),
        ({"data": []}, "--data or --invent is needed"),
        ({"model": ""}, "--model is needed"),
        ({"data": ["missing.jsonl.gz"]}, "missing.jsonl.gz: no such data file"),
        ({"samples": 10**12}, "m1 sample: .* GiB on the disk"),
    ],
)
def test_bad_input_leaves_nothing(model, problems, tmp_path, fields, message):
    settings = config(model, problems, tmp_path / "out")
    for name, value in fields.items():
        setattr(settings, name, value)
    with pytest.raises((ValueError, OSError), match=message):
        run(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "chosen"), [("cuda", []), ("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_a_gpu_is_chosen_where_it_has_a_number(model, problems, tmp_path, monkeypatch, device, chosen):
    made, asked = [], []

    def set_device(device):
        if device.index is None:  # as torch does
            raise ValueError("Expected a torch.device with a specified index")
        asked.append(str(device))

    monkeypatch.setattr(sample_module, "local_device", lambda name: torch.device(device))
    monkeypatch.setattr(sample_module, "Engine", lambda *names, **options: made.append(options["device"]))
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    options = config(model, problems, tmp_path / "out")
    sample_module._load_engine(options, word_tokenizer(), [])
    assert asked == chosen and made == [torch.device(device)]


@pytest.mark.gpu
def test_on_the_only_gpu_which_has_no_number(model, problems, tmp_path):
    run(config(model, problems, tmp_path / "out", device="cuda"))
    assert len(rows_of(tmp_path / "out")) == 18 and read_run_record(tmp_path / "out")["samples"] == 18
