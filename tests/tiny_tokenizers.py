"""Small tokenizers of every kind that vision-language models use, trained here on a few sentences."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the red car on the left.",
    "a dog beside the assistant, in this image?",
    "user: the second giraffe from the right",
    "You are a helpful assistant.",
    "Größe naïve 左边的狗。 the café",
]
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
    """SentencePiece's kind, with (Llama 2) or without (Gemma) a blank put before the first word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return tokenizer


def _word_pieces() -> Tokenizer:
    """BERT's kind: lower case, no accents, no blanks."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return tokenizer


def _words() -> Tokenizer:
    """Whole words; those it does not know are all the same token."""
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
