"""Byte-level BPE over lower-cased text, trained on the captions at hand, saved as tokenizer.json.

Wraps Hugging Face `tokenizers`; adds the five special tokens the models need, the end token last,
so that it has the highest id (CLIP finds it by argmax). Left out: anything but fixed-length
batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ("<pad>", "<mask>", "<unk>", "<start>")
END = "<end>"


class Tokenizer:
    """Text to fixed-length rows of ids: `<start> pieces <end> <pad> ...`.

    Args:
        inner: a trained `tokenizers.Tokenizer` that holds the special tokens.
        length: columns of a row; longer texts are cut, the end token stays.
    """

    def __init__(self, inner: tokenizers.Tokenizer, length: int) -> None:
        self.inner = inner
        self.length = length
        ids = {name: inner.token_to_id(name) for name in (*SPECIAL, END)}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise ValueError(f"Tokenizer: expected special tokens {missing}, got none of them")
        self.pad, self.mask, self.start, self.end = (
            ids[name] for name in ("<pad>", "<mask>", "<start>", END)
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, length: int) -> Tokenizer:
        """Learn the merges from `texts`; the result has at most `vocab_size` ids."""
        inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        inner.add_special_tokens([END])
        return cls(inner, length)

    @classmethod
    def load(cls, path: str | Path, *, length: int) -> Tokenizer:
        """Read tokenizer.json."""
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(
                f"Tokenizer: {path}: expected a tokenizer.json, got {error}"
            ) from error
        return cls(inner, length)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json."""
        self.inner.save(str(path))

    @property
    def first_piece(self) -> int:
        """The lowest id that stands for text; special tokens are below it, the end token above."""
        return len(SPECIAL)

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def pieces(self, text: str) -> list[int]:
        """Ids of one text without special tokens, cut to what a row can hold."""
        return self.inner.encode(text, add_special_tokens=False).ids[: self.length - 2]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), length] int64."""
        out = torch.full((len(texts), self.length), self.pad, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self.pieces(text), self.end]
            row[: len(ids)] = torch.tensor(ids)
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def token(self, token: int) -> str:
        """One id as readable text."""
        return self.inner.decode([int(token)], skip_special_tokens=False).strip()
