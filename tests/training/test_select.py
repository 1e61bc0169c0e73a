"""Which layers become attention again: the one known by construction, brute force, picks in their order, and the command."""

import itertools
import json

import pytest
import torch

from m1.config import SelectConfig
from m1.conversion.convert import read_layers
from m1.modeling.loading import load_model
from m1.storage import read_run_record
from m1.training import select as select_module
from m1.training.distill import compare
from m1.training.select import PLOT, SELECTION, Selection, select
from tests.numerics import CHUNKED_LOSS
from tests.training import tiny

LAYERS = 5
OPTIONS = {"tokens_per_batch": 40, "precision": "float32", "progress": False}


def models(mixer="mamba2"):
    """A teacher, and a student that shares everything with it but has random mixers everywhere."""
    student = tiny.model(mixer, attention=(), layers=LAYERS)
    return student, tiny.teacher_of(student)


def with_attention(teacher, layers, mixer="mamba2"):
    """The hybrid that restoring `layers` should give, made in the ordinary way."""
    student, _ = models(mixer)
    hybrid = tiny.model(mixer, attention=layers, layers=LAYERS)
    hybrid.load_state_dict(student.state_dict(), strict=False)
    hybrid.load_state_dict({name: tensor for name, tensor in teacher.state_dict().items() if "mixer" not in name}, strict=False)
    return hybrid


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_one_pick_is_brute_force(mixer):
    documents = tiny.documents(6)
    student, teacher = models(mixer)
    found = select(student, teacher, documents, 1, **OPTIONS).rounds[0]
    expected = {
        layer: compare(with_attention(teacher, (layer,), mixer), teacher, documents, precision="float32")["kl"]
        for layer in range(LAYERS)
    }
    assert found.kl_of_layer == pytest.approx(expected, rel=CHUNKED_LOSS * 10)
    assert found.chosen == min(expected, key=expected.get)
    before = compare(with_attention(teacher, (), mixer), teacher, documents, precision="float32")["kl"]
    assert found.kl_before == pytest.approx(before, rel=CHUNKED_LOSS * 10)


@pytest.mark.parametrize("important", [0, 3])
def test_the_layer_that_matters_is_found(important):
    """Attention and mixers of all other layers give next to nothing, so only one layer is worth restoring."""
    student, teacher = models()
    with torch.no_grad():
        for layer in set(range(LAYERS)) - {important}:
            teacher.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
            student.model.layers[layer].mixer.out_proj.weight.mul_(1e-3)
    selection = select(student, teacher, tiny.documents(6), 2, **OPTIONS)
    assert selection.ranking[0] == important
    assert selection.rounds[1].kl_before == selection.rounds[0].kl_of_layer[important]
    assert selection.rounds[1].kl_before < 0.01 * selection.rounds[0].kl_before


def test_picks_are_measured_anew_and_the_student_becomes_the_hybrid():
    documents, (student, teacher) = tiny.documents(6), models()
    selection = select(student, teacher, documents, 3, **OPTIONS)
    assert [sorted(one.kl_of_layer) for one in selection.rounds] == [
        [layer for layer in range(LAYERS) if layer not in selection.ranking[:picked]] for picked in range(3)
    ]
    for picked, one in enumerate(selection.rounds):
        for layer, kl in one.kl_of_layer.items():
            hybrid = with_attention(teacher, (*selection.ranking[:picked], layer))
            assert kl == pytest.approx(compare(hybrid, teacher, documents, precision="float32")["kl"], rel=CHUNKED_LOSS * 10)
    assert student.config.attention_layers == selection.attention_layers == sorted(selection.ranking)
    expected = with_attention(teacher, selection.attention_layers).state_dict()
    assert expected.keys() == student.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())


def test_with_all_layers_restored_nothing_is_left():
    student, teacher = models()
    selection = select(student, teacher, tiny.documents(4), LAYERS, **OPTIONS)
    last = selection.rounds[-1]
    assert last.kl_of_layer[last.chosen] == pytest.approx(0.0, abs=1e-6)
    assert sorted(selection.ranking) == list(range(LAYERS))


def test_a_selection_goes_on_where_it_was():
    documents = tiny.documents(6)
    whole = select(*models(), documents, 3, **OPTIONS)
    seen: list[dict] = []
    select(*models(), documents, 2, **OPTIONS, on_round=lambda one: seen.append(json.loads(json.dumps(one.as_json()))))
    assert [len(one["rounds"]) for one in seen] == [1, 2]
    for begun in seen:
        assert select(*models(), documents, 3, **OPTIONS, begun=Selection.from_json(begun)) == whole


def test_layers_that_are_attention_already_count():
    student, teacher = models()
    first = select(student, teacher, tiny.documents(4), 2, **OPTIONS)
    more = select(student, teacher, tiny.documents(4), 3, **OPTIONS)
    assert more.kept == first.attention_layers
    assert len(more.ranking) == 1
    with pytest.raises(ValueError, match="expected 4 to 5 attention layers, got 3; 3 of the student's"):
        select(student, teacher, tiny.documents(4), 3, **OPTIONS)
    with pytest.raises(ValueError, match="num_hidden_layers 3, the student 5"):
        select(models()[0], tiny.model(attention=(0, 1, 2), layers=3), tiny.documents(4), 1, **OPTIONS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    student = tiny.model("mamba2", attention=(), layers=4, vocab_size=259)
    teacher = tiny.model("mamba2", attention=range(4), layers=4, vocab_size=259, seed=1)
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(root / name)
        tiny.byte_tokenizer().save_pretrained(root / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in itertools.product(range(5), repeat=2)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(root, out, **fields):
    names = {"model": str(root / "student"), "teacher": str(root / "teacher"), "out": str(out)}
    options = {"data": [str(root / "sums.jsonl")], "keep": 2, "precision": "float32", "dtype": "float32", "device": "cpu"}
    return SelectConfig(**names | options | fields)


def test_the_command_writes_the_list_and_the_hybrid(directories, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    measure, calls = select_module._measure, []

    def measure_once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(select_module, "_measure", measure_once)
        with pytest.raises(KeyboardInterrupt):
            select_module.run(config(directories, out))
    assert len(json.loads((out / SELECTION).read_text())["rounds"]) == 1
    monkeypatch.setattr(select_module, "_measure", lambda *arguments: calls.append(1) or measure(*arguments))
    select_module.run(config(directories, out))
    assert len(calls) == 2, "the pick that was made before the interruption was not made again"

    written = json.loads((out / SELECTION).read_text())
    assert written["attention_layers"] == sorted(one["layer"] for one in written["ranking"])
    assert read_layers(str(out / SELECTION)) == written["attention_layers"]
    assert (out / PLOT).read_text().count("<svg")
    hybrid, student, teacher = (load_model(path) for path in (out, directories / "student", directories / "teacher"))
    assert hybrid.config.attention_layers == written["attention_layers"]
    for name, tensor in hybrid.state_dict().items():
        source = teacher if "self_attn" in name else student
        assert torch.equal(tensor, source.state_dict()[name]), name
    assert read_run_record(out)["ranking"] == written["ranking"]
    printed = capsys.readouterr().out
    assert f"  1. layer {written['ranking'][0]['layer']}: KL" in printed
    select_module.run(config(directories, out))
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 5}, "--keep: expected 1 to 4, got 5"),
        ({"keep": 0}, "--keep: expected 1 to 4, got 0"),
        ({"keep": None, "attention_fraction": 0.0}, "--attention-fraction: expected more than 0"),
        ({"teacher": ""}, "--teacher is needed"),
        ({"data": ["missing.jsonl"]}, "missing.jsonl: no such data file"),
    ],
)
def test_bad_input_leaves_nothing(directories, tmp_path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        select_module.run(config(directories, tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()


def test_files_of_layers(tmp_path):
    for name, text in (
        ("a.json", '{"attention_layers": [3, 1]}'),
        ("b.toml", "attention_layers = [3, 1]"),
        ("c.json", "[3, 1]"),
    ):
        (tmp_path / name).write_text(text)
        assert read_layers(str(tmp_path / name)) == [3, 1]
    for name, text in (("d.json", "{"), ("e.json", '{"layers": [1]}'), ("f.json", '[1, "2"]'), ("g.toml", "x =")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read_layers(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"--attention-layers nowhere\.json"):
        read_layers("nowhere.json")
    assert read_layers([1, 2]) == [1, 2]
    assert read_layers(None) is None
