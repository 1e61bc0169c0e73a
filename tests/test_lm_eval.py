"""lm-evaluation-harness, where it is installed, runs a hybrid through its `hf` model type as it is."""

import json

import pytest
import torch

import m1.modeling  # noqa: F401  # makes the architecture known to transformers
from tests.engine.models import byte_tokenizer, tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{problem}}}}"
{more}
"""


def test_both_kinds_of_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{n} + 1 =", "answer": "2"}) + "\n" for n in range(3)))
    kinds = {
        "generate_until": """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]""",
        "multiple_choice": """doc_to_target: 0
doc_to_choice: ["2", "3"]""",
    }
    for kind, more in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(name=f"m1_{kind}", data=data, kind=kind, more=more))
    model = tiny_model("mamba1")
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},dtype=float32,backend=causal",
        tasks=["m1_generate_until", "m1_multiple_choice"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        device="cpu",
        batch_size=2,
    )
    sample = results["samples"]["m1_multiple_choice"][0]
    for choice, (found, _) in zip(("2", "3"), sample["filtered_resps"], strict=True):
        prompt, answer = tokenizer.encode("0 + 1 ="), tokenizer.encode(f" {choice}", add_special_tokens=False)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        assert found == pytest.approx(expected, abs=1e-3)
    completion = results["samples"]["m1_generate_until"][0]["resps"][0][0]
    prompt = tokenizer.encode("0 + 1 =")
    ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=5, do_sample=False)
    assert completion == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).split("\n")[0]
