"""A word tokenizer and a small text tower for prompts of a closed vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .attention import attention

Array = jax.Array
PAD, UNKNOWN, BEGIN = 0, 1, 2


def train_tokenizer(captions: Iterable[str], path: str | Path) -> None:
    """Writes a tokenizer.json whose vocabulary is every word of the captions, lower-cased and without punctuation."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(",", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[BOS]"]))
    tokenizer.save(str(path))


class WordTokenizer:
    """Prompts to token ids [B, length]: [BOS] and the words, padded with 0. An empty prompt is the null condition."""

    def __init__(self, path: str | Path, length: int):
        from tokenizers import Tokenizer

        self.tokenizer, self.length = Tokenizer.from_file(str(path)), length

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self.tokenizer.get_vocab_size()

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """int32 [B, length]. Raises ValueError for a prompt longer than the text tower, naming it."""
        out = np.full((len(prompts), self.length), PAD, np.int32)
        for row, (prompt, encoding) in enumerate(zip(prompts, self.tokenizer.encode_batch(list(prompts)), strict=True)):
            ids = [BEGIN, *encoding.ids]
            if len(ids) > self.length:
                raise ValueError(f"prompt {row} has {len(ids) - 1} words, the text tower reads {self.length - 1}: "
                                 f"{prompt[:80]!r}. Shorten it.")  # fmt: skip
            out[row, : len(ids)] = ids
        return out


class TextTower(nn.Module):
    """A pre-norm transformer over tokens [B, L] -> {"states" [B,L,D], "mask" [B,L], "pooled" [B,D]}."""

    vocabulary: int
    features: int = 128
    layers: int = 2
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> dict[str, Any]:
        """tokens int32 [B, L]; 0 is padding and is masked."""
        b, length = tokens.shape
        mask = tokens != PAD
        x = nn.Embed(self.vocabulary, self.features, dtype=self.dtype, name="token")(tokens)
        x = x + self.param("position", nn.initializers.normal(0.02), (length, self.features)).astype(self.dtype)
        for i in range(self.layers):
            h = nn.LayerNorm(dtype=jnp.float32, name=f"norm_attention_{i}")(x).astype(self.dtype)
            q, k, v = jnp.split(
                nn.Dense(3 * self.features, dtype=self.dtype, name=f"to_qkv_{i}")(h).reshape(b, length, self.heads, -1),
                3,
                -1,
            )
            h = attention(q, k, v, mask).reshape(b, length, self.features)
            x = x + nn.Dense(self.features, dtype=self.dtype, name=f"to_out_{i}")(h)
            h = nn.LayerNorm(dtype=jnp.float32, name=f"norm_mlp_{i}")(x).astype(self.dtype)
            h = nn.gelu(nn.Dense(4 * self.features, dtype=self.dtype, name=f"mlp_in_{i}")(h))
            x = x + nn.Dense(self.features, dtype=self.dtype, name=f"mlp_out_{i}")(h)
        states = nn.LayerNorm(dtype=jnp.float32, name="norm_out")(x)
        weight = mask[..., None].astype(states.dtype)
        pooled = (states * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        return {"states": states, "mask": mask, "pooled": pooled}
