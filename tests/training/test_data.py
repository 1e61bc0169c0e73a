"""From rows to tokens: what the model sees, and what the loss is on."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from m1.training.data import SegmentEncoder, make_documents, prompt_ids
from tests.training.tiny import byte_tokenizer

FORGETFUL = (  # leaves the thoughts of earlier turns out, as reasoning models' templates do
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def documents(rows, tokenizer, **options):
    return make_documents(rows, tokenizer, **{"max_length": 1000} | options)


def texts(document, tokenizer):
    """(everything, what the loss is on), as text."""
    return tokenizer.decode(document.token_ids), tokenizer.decode(document.token_ids[document.is_target])


def test_messages_under_a_chat_template():
    tokenizer = byte_tokenizer()
    turns = [("system", "be"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (document,) = documents([row], tokenizer)
    everything, learnt = texts(document, tokenizer)
    rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert everything == rendered.removesuffix("\n")
    assert learnt == "two<|im_end|>four<|im_end|>"
    everything, learnt = texts(documents([row], tokenizer, loss_on="all")[0], tokenizer)
    assert learnt == everything == rendered.removesuffix("\n")


def test_prompt_and_completion_with_and_without_a_template():
    row = {"prompt": "1+1=", "completion": "2"}
    chat, plain = byte_tokenizer(), byte_tokenizer(chat_template=None)
    everything, learnt = texts(documents([row], chat)[0], chat)
    assert everything == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert learnt == "2<|im_end|>"
    everything, learnt = texts(documents([row], plain)[0], plain)
    assert everything == "1+1=2<|im_end|>"
    assert learnt == "2<|im_end|>"


def test_the_prompt_of_a_document_is_the_prompt_at_inference():
    row = {"prompt": "1+1=", "completion": "2"}
    for tokenizer in (byte_tokenizer(), byte_tokenizer(chat_template=None)):
        (document,) = documents([row], tokenizer)
        prompt = prompt_ids(tokenizer, "1+1=")
        assert document.token_ids[~document.is_target].tolist() == prompt


def test_problem_and_answer():
    tokenizer = byte_tokenizer(chat_template=None)
    rows = [
        {"problem": "p", "answer": "3"},
        {"problem": "p", "answer": "3", "solution": "1+2"},
        {"problem": "p", "answer": "3", "solution": "so \\boxed{3}"},
    ]
    made = [texts(document, tokenizer) for document in documents(rows, tokenizer, suffix=" Think.")]
    assert [learnt for _, learnt in made] == [
        "\\boxed{3}<|im_end|>",
        "1+2\n\\boxed{3}<|im_end|>",
        "so \\boxed{3}<|im_end|>",
    ]
    assert all(everything.startswith("p Think.") for everything, _ in made)


def test_templates_that_rewrite_earlier_turns_give_a_document_a_turn():
    tokenizer = byte_tokenizer(FORGETFUL)
    turns = [("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "<think>y</think>d")]
    made = documents([{"messages": [{"role": role, "content": content} for role, content in turns]}], tokenizer)
    everything, learnt = zip(*(texts(document, tokenizer) for document in made))
    assert learnt == ("<think>x</think>b<|im_end|>", "<think>y</think>d<|im_end|>")
    assert "x" not in everything[1]
    assert everything[1].startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>")


@pytest.mark.parametrize("template", ["has one", None])
def test_a_sample_that_was_cut_off_does_not_end(template):
    tokenizer = byte_tokenizer() if template else byte_tokenizer(chat_template=None)
    row = {"prompt": "ab", "completion": "cd"}
    whole, cut = documents([row | {"finish_reason": "stop"}, row | {"finish_reason": "length"}], tokenizer)
    assert whole.token_ids[-1] == tokenizer.eos_token_id
    assert whole.is_target[-1]
    assert cut.token_ids.tolist() == whole.token_ids[:-1].tolist()
    assert tokenizer.decode(cut.token_ids[cut.is_target]) == "cd"


def test_cut_documents_and_those_without_a_target():
    tokenizer = byte_tokenizer(chat_template=None)
    rows = [{"prompt": "abc", "completion": "defgh"}, {"prompt": "abcdefgh", "completion": "i"}]
    made = documents(rows, tokenizer, max_length=6)
    assert len(made) == 1
    assert texts(made[0], tokenizer) == ("abcdef", "def")
    with pytest.raises(ValueError, match="--max-length 3"):
        documents(rows, tokenizer, max_length=3)


def test_mistakes_are_named():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="row 1: 'messages' need a chat template"):
        documents([row], byte_tokenizer(chat_template=None))
    template = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    tool = {"messages": [*row["messages"], {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"}]}
    with pytest.raises(ValueError, match=r"row 2: .*refuses.*no tools"):
        documents([row, tool], byte_tokenizer(template))
    with pytest.raises(ValueError, match="generation prompt"):
        documents(
            [row], byte_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ 'x' if add_generation_prompt }}")
        )
    with pytest.raises(ValueError, match="loss_on"):
        documents([row], byte_tokenizer(), loss_on="some")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Prepends a space to every text, as Llama-2's and Mistral's tokenizers do, and adds <s>."""
    pieces = ["</s>", "<s>", "▁", "▁a", "▁b", "▁ab", "a", "b", "▁[X]", "[X]"]
    backend = Tokenizer(models.Unigram([(piece, -len(pieces) + len(piece)) for piece in pieces], unk_id=2))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="</s>")


def test_tokenizers_that_prepend_a_space():
    tokenizer = sentencepiece_like()
    encoder = SegmentEncoder(tokenizer)
    assert encoder.prepends_space
    assert encoder.start == [1]
    ((ids, is_completion),) = encoder.encode([[("a[X]", False), (" b a", True)]])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁a", "[X]", "▁b", "▁a", "</s>"]
    assert is_completion.tolist() == [False, False, False, True, True, True]
    assert prompt_ids(tokenizer, "a[X]") == ids[:3].tolist()


def test_an_empty_completion_is_the_end_token():
    encoder = SegmentEncoder(byte_tokenizer())
    assert not encoder.prepends_space
    ((ids, flags),) = encoder.encode([[("ab", False), ("", True)]])
    assert ids[-1] == 0
    np.testing.assert_array_equal(flags, [False, False, True])
