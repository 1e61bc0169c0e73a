"""The tokenizer that a GGUF file describes, built from its metadata: byte-level BPE with the right pre-tokenizer.

transformers' own import guesses the pre-tokenizer from the architecture and leaves special tokens unregistered; the file
says both (`tokenizer.ggml.pre`, `tokenizer.ggml.token_type`), so they are taken from there. Weights and config: gguf.py.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# llama.cpp's token types.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

# The pattern by which a family splits text before BPE, as the family's own tokenizer.json has it; {digits} is the number
# of digits that may stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# tokenizer.ggml.pre (llama.cpp's name) -> (pre-tokenizer, whether text is NFC-normalised, whether whole words in the
# vocabulary skip the merges, whether a beginning-of-sequence token is added unless the file says otherwise).
_PRE_TOKENIZERS = {
    "gpt-2": (_gpt2, False, False, False),
    "smollm": (_smollm, False, False, False),
    "qwen2": (lambda: _split(""), True, False, False),
    "deepseek-r1-qwen": (lambda: _split(""), True, False, False),
    "llama-bpe": (lambda: _split("{1,3}"), False, True, True),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of GGUF `metadata` (key -> value, `tokenizer.*` keys), with its chat template and special tokens.

    Unused ids at the end of the vocabulary (padding of the embedding matrix) are left out, as the families' own tokenizers
    do. Raises ValueError for a vocabulary that is not byte-level BPE and for an unknown pre-tokenizer, naming it: a guess
    would tokenize almost right.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"the GGUF file's tokenizer (tokenizer.ggml.model {kind!r}, tokenizer.ggml.pre {pre!r}) is not supported; "
            f"byte-level BPE ('gpt2') with pre one of {', '.join(_PRE_TOKENIZERS)} is. Convert from the model's "
            "Hugging Face directory instead"
        )
    make_pre_tokenizer, is_nfc, ignores_merges, adds_bos = _PRE_TOKENIZERS[pre]
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if len(tokens) != len(types):
        raise ValueError(f"tokenizer.ggml.token_type: expected {len(tokens)} entries, one a token, got {len(types)}")
    num_used = max(index for index, kind in enumerate(types) if kind != UNUSED) + 1

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens[:num_used])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignores_merges))
    tokenizer.normalizer = normalizers.NFC() if is_nfc else None
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens[:num_used], types):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])

    names = {
        name: tokens[metadata[key]]
        for name, key in {
            "bos_token": "tokenizer.ggml.bos_token_id",
            "eos_token": "tokenizer.ggml.eos_token_id",
            "unk_token": "tokenizer.ggml.unknown_token_id",
            "pad_token": "tokenizer.ggml.padding_token_id",
        }.items()
        if key in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )
