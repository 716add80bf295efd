"""Small tokenizers of every common kind, and a chat template with their markers."""

import string

from tiny_training import make_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

MARKERS = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CORPUS = ["the sky is blue", "the grass is green", "Blue Green ?", "what of the sky and the grass"] * 9
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{{ tools | tojson }}{{ eos_token }}{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _bpe(pre_tokenizer=None, normalizer=None, post=None) -> PreTrainedTokenizerFast:
    is_bytes = isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
    raw = Tokenizer(BPE(unk_token="<unk>"))
    if pre_tokenizer is not None:
        raw.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.decoder = decoders.ByteLevel() if is_bytes else decoders.Replace("▁", " ")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else [*string.printable, "▁"]
    raw.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=360, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False)
    )
    if post is not None:
        raw.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _around(text: str):
    return processors.TemplateProcessing(single=text, special_tokens=[("<s>", 1), ("</s>", 2)])


def _words():
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKERS[3:]})
    return made


def _bytes(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


KINDS = {
    "bytes": lambda: _bpe(_bytes()),
    "bytes, offsets trimmed": lambda: _bpe(_bytes(), post=processors.ByteLevel(trim_offsets=True)),
    "metaspace always": lambda: _bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), post=_around("<s> $A")),
    "metaspace first": lambda: _bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), post=_around("<s> $A")),
    "metaspace by normalizer": lambda: _bpe(
        pre_tokenizers.Split("▁", "merged_with_next"),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        post=_around("<s> $A"),
    ),
    "appends EOS": lambda: _bpe(_bytes(), post=_around("<s> $A </s>")),
    "words": _words,
}


def made(kind: str):
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = TEMPLATE
    return tokenizer
