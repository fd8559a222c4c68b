"""Small tokenizers of every kind that vision-language models use, trained on a few sentences."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the red car on the left.", "a dog beside the assistant, in this image?",
    "user: the second giraffe from the right", "You are a helpful assistant.", "Größe naïve 左边的狗。 the café",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<start>", "<end>"]


def _byte_level() -> Tokenizer:
    """GPT-2's kind, as in Qwen, Llama 3, InternVL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def _metaspace(prepend: str) -> Tokenizer:
    """SentencePiece's kind, with (Llama 2) or without (Gemma) a space before the first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return tokenizer


def _word_pieces() -> Tokenizer:
    """BERT's kind: lower case, no accents, no spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return tokenizer


def _words() -> Tokenizer:
    """Whole words; unknown ones are all the same token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS[:2], trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return tokenizer


KINDS = {
    "byte-level": _byte_level,
    "metaspace": lambda: _metaspace("first"),
    "metaspace-never": lambda: _metaspace("never"),
    "word-pieces": _word_pieces,
    "words": _words,
}


LLAMA_IDS = {
    **{
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "<0x0A>": 13,
        "in": 262,
        "▁in": 297,
        "the": 1552,
        "▁dog": 11203,
        "▁": 29871,
    },
    **{letter: 29900 + place for place, letter in enumerate("acdefghilmnorstu")},
    **{".": 29889, "3": 29941, "th": 31990, "do": 31991, "dog": 31992, "<image>": 32000, "<pad>": 32001},
}
"""LLaMA's tokens and ids, as far as prompts about a dog need them; the ids of letters are made up."""


@cache
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """LLaMA's kind: a space before every text, which is a token of its own if no longer token begins with it."""
    merges = [("t", "h"), ("th", "e"), ("d", "o"), ("do", "g"), ("i", "n"), ("▁", "dog"), ("▁", "in")]
    tokenizer = Tokenizer(models.BPE(LLAMA_IDS, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            f"{name}_token": f"<{word}>" for name, word in (("pad", "pad"), ("bos", "s"), ("eos", "/s"), ("unk", "unk"))
        },
        extra_special_tokens={"image_token": "<image>"},
    )


@cache
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges like those of Llama 3 and Qwen: `".` is one token, `).` is two."""
    words = ["EXIT", " dog", " left", " sign", " the", "the", ' "', '".']
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [word.replace(" ", "Ġ") for word in words]
    merges, vocabulary = [], {token: id for id, token in enumerate([*SPECIAL, *alphabet])}
    for word in spelled:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<start>", "<end>"],
        extra_special_tokens={"image_token": "<image>"},
    )


@cache
def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<start>", "<end>"],
        extra_special_tokens={"image_token": "<image>"},
    )
