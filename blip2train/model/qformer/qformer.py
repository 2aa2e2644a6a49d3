"""The Querying Transformer: image tokens (B, P, I) and text (B, T) -> query states (B, Q, D) and text states (B, T, D).

Implements section 3.1 and Figure 2 of BLIP-2. LAVIS patches a copy of BERT whose one forward takes nine optional
arguments; here each use has its verb, and `joint` runs one pass under an explicit mask as the verbs' specification.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2train.errors import ConfigError
from blip2train.model.qformer.attention import KeysValues
from blip2train.model.qformer.block import QFormerBlock
from blip2train.model.qformer.mask import multimodal_causal

ImageKeysValues = list[KeysValues | None]
"""Per layer the image's keys and values for cross-attention, each (B, H, P, K); None where a layer has none."""


@dataclass(slots=True)
class QueryStates:
    """What the queries know of a batch of images.

    Args:
        hidden: (B, Q, D), the last layer's query rows: BLIP-2's Z.
        keys_values: per layer the queries' self-attention keys and values, each (B, H, Q, K); text decodes on them.
        image: per layer the image's cross-attention keys and values, for `fuse` on the same images.
    """

    hidden: Tensor
    keys_values: list[KeysValues]
    image: ImageKeysValues


class TextEmbeddings(nn.Module):
    """Word plus learned position embeddings of ids (B, T) -> (B, T, D); positions count from 0 at the first token."""

    def __init__(self, vocab_size: int, max_positions: int, hidden_size: int, pad_id: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_id)
        self.position = nn.Embedding(max_positions, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        length, longest = ids.shape[1], self.position.num_embeddings
        if length > longest:
            raise ConfigError(
                f"a text of {length} tokens, but the Q-Former has {longest} positions",
                where="model.qformer.max_positions",
                fix="raise max_positions, or lower the collator's max_tokens",
            )
        embedded_BTD: Tensor = self.word(ids) + self.position.weight[:length]
        return embedded_BTD


class LanguageModelHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, then the tied word embeddings and a bias."""

    def __init__(self, hidden_size: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Project (..., D) on word embeddings (V, D) -> logits (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class QFormer(nn.Module):
    """BERT-shaped transformer over learned queries and text (defaults elsewhere: BERT-base, 32 queries).

    Position embeddings are for text only; queries cross-attend to the image in layers 0, n, 2n, ... with
    n = `cross_attention_every`. Weights start as BERT's do: N(0, `initializer_range`), the query tokens too
    (transformers' Blip2 starts them at zero, where queries can only be told apart by dropout).

    Args:
        hidden_size: width D.
        num_layers: number of blocks.
        num_heads: attention heads; divides `hidden_size`.
        num_queries: learned query tokens Q.
        cross_attention_every: 2 in the paper ("every other block").
        image_dim: width I of the image tokens.
        vocab_size: text vocabulary with the added [DEC].
        intermediate_size: inner width of the feed-forward networks.
        max_positions: longest text in tokens.
        dropout: probability on embeddings, attention weights and every residual branch.
        layer_norm_eps: epsilon of every LayerNorm.
        pad_id: its word embedding starts at zero.
        initializer_range: standard deviation of the initial weights.
        checkpoint_activations: in training, keep only each block's inputs and outputs and compute the rest again in the
            backward pass: less memory, a third more time in the Q-Former. The keys and values that text decodes on are
            outputs and stay; LAVIS's version drops them, which breaks its generation loss.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        num_queries: int,
        cross_attention_every: int,
        image_dim: int,
        vocab_size: int,
        intermediate_size: int,
        max_positions: int,
        dropout: float,
        layer_norm_eps: float = 1e-12,
        pad_id: int = 0,
        initializer_range: float = 0.02,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_heads, num_queries, cross_attention_every, pad_id, vocab_size)
        self.hidden_size = hidden_size
        self.num_queries = num_queries
        self.image_dim = image_dim
        self.dropout = dropout
        self.checkpoint_activations = checkpoint_activations
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, hidden_size))
        self.embedding_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.text_embeddings: TextEmbeddings | None = TextEmbeddings(vocab_size, max_positions, hidden_size, pad_id)
        self.lm_head: LanguageModelHead | None = LanguageModelHead(hidden_size, vocab_size, layer_norm_eps)
        self.blocks = nn.ModuleList(
            QFormerBlock(
                hidden_size,
                num_heads,
                intermediate_size,
                image_dim if layer % cross_attention_every == 0 else None,
                dropout,
                layer_norm_eps,
            )
            for layer in range(num_layers)
        )
        self._initialise(initializer_range)

    def encode_image(self, image_tokens: Tensor | ImageKeysValues) -> QueryStates:
        """Let the queries read images (B, P, I), or their `image_keys_values`; no text is seen.

        Runs once per step: `decode` and `fuse` reuse it.
        """
        image = self.image_keys_values(image_tokens) if isinstance(image_tokens, Tensor) else image_tokens
        batch = next(keys_values[0].shape[0] for keys_values in image if keys_values is not None)
        hidden_BQD = self._embed(self.query_tokens.expand(batch, -1, -1))
        keys_values = []
        for block, image_of_layer in zip(self._layers(), image, strict=True):
            hidden_BQD, own = self._run(block, hidden_BQD, self.num_queries, image=image_of_layer)
            keys_values.append(own)
        return QueryStates(hidden_BQD, keys_values, image)

    def encode_text(self, ids: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """Encode text on its own, bidirectionally: the text side of `mask.unimodal`.

        Args:
            ids: (B, T).
            mask: (B, T) bool, True on real tokens.
            rows: how many leading rows of the result are wanted; the contrastive loss reads one ([CLS]).

        Returns:
            (B, rows or T, D).
        """
        hidden_BTD = self._embed(self._text()(ids))
        last = len(self.blocks) - 1
        for layer, block in enumerate(self._layers()):
            hidden_BTD, _ = self._run(
                block, hidden_BTD, 0, mask=mask[:, None, None, :], rows=rows if layer == last else None
            )
        return hidden_BTD

    def fuse(
        self,
        image_tokens: Tensor | ImageKeysValues,
        ids: Tensor,
        mask: Tensor,
        image_rows: Tensor | None = None,
        more_images: ImageKeysValues | None = None,
    ) -> Tensor:
        """Let queries read image and text together: `mask.bidirectional`, as image-text matching needs it.

        Args:
            image_tokens: (N, P, I), or `QueryStates.image` of the same images to reuse their keys and values.
            ids: (B, T).
            mask: (B, T) bool, True on real tokens.
            image_rows: (B,) int64, which of the N images goes with each text; None pairs them in order (N = B).
                Each image is projected once, however many texts meet it.
            more_images: `image_keys_values` of further images, which `image_rows` counts from N on.

        Returns:
            (B, Q, D): query rows only; the text rows of the last layer are not computed.
        """
        image = self.image_keys_values(image_tokens) if isinstance(image_tokens, Tensor) else image_tokens
        queries_BQD = self.query_tokens.expand(ids.shape[0], -1, -1)
        hidden_BSD = self._embed(torch.cat([queries_BQD, self._text()(ids)], dim=1))
        visible_BS = torch.cat([mask.new_ones(len(mask), self.num_queries), mask], dim=1)
        last = len(self.blocks) - 1
        more = [None] * len(image) if more_images is None else more_images
        for layer, (block, image_of_layer, more_of_layer) in enumerate(zip(self._layers(), image, more, strict=True)):
            hidden_BSD, _ = self._run(
                block,
                hidden_BSD,
                self.num_queries,
                mask=visible_BS[:, None, None, :],
                image=_select(image_of_layer, more_of_layer, image_rows),
                rows=self.num_queries if layer == last else None,
            )
        return hidden_BSD

    def decode(self, ids: Tensor, mask: Tensor, past: QueryStates) -> Tensor:
        """Run text causally on the queries' cached keys and values: the text rows of `mask.multimodal_causal`.

        Equals the one-pass form of UniLM because query rows never see text. `lm_logits` turns the result into words.

        Args:
            ids: (B, T), starting with [DEC].
            mask: (B, T) bool, True on real tokens.
            past: from `encode_image` on the same images.

        Returns:
            (B, T, D).
        """
        mask_BTS = multimodal_causal(self.num_queries, mask)[:, self.num_queries :]
        hidden_BTD = self._embed(self._text()(ids))
        for block, queries in zip(self._layers(), past.keys_values, strict=True):
            hidden_BTD, _ = self._run(block, hidden_BTD, 0, mask=mask_BTS[:, None], past=queries)
        return hidden_BTD

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., V) of text states (..., D)."""
        assert self.lm_head is not None, "the text branch was dropped"
        logits: Tensor = self.lm_head(hidden, self._text().word.weight)
        return logits

    def joint(self, image_tokens: Tensor, ids: Tensor, mask: Tensor, attention: Tensor) -> Tensor:
        """One pass over queries and text under an explicit mask: slow, plain, and the specification of the verbs.

        Args:
            image_tokens: (B, P, I).
            ids: (B, T).
            mask: (B, T) bool; what may be attended to is said by `attention` alone.
            attention: (B, S, S) bool from `mask.py`, True = may attend.

        Returns:
            (B, S, D), queries first.
        """
        assert attention.shape[1] == self.num_queries + mask.shape[1]
        queries_BQD = self.query_tokens.expand(ids.shape[0], -1, -1)
        hidden_BSD = self._embed(torch.cat([queries_BQD, self._text()(ids)], dim=1))
        for block, image in zip(self._layers(), self.image_keys_values(image_tokens), strict=True):
            hidden_BSD, _ = self._run(block, hidden_BSD, self.num_queries, mask=attention[:, None], image=image)
        return hidden_BSD

    def image_keys_values(self, image_tokens: Tensor) -> ImageKeysValues:
        """Project image tokens (B, P, I) for every cross-attention, once, for as many passes as need them."""
        if image_tokens.shape[-1] != self.image_dim:
            raise ConfigError(
                f"image tokens of width {image_tokens.shape[-1]}, but the Q-Former was built for {self.image_dim}",
                where="model.qformer.image_dim",
                fix="set it to the vision encoder's embed_dim",
            )
        crossing = [block.cross_attention for block in self._layers()]
        return [None if attention is None else attention.keys_values(image_tokens) for attention in crossing]

    def drop_text_branch(self) -> None:
        """Remove what only text uses (embeddings, feed-forward networks, LM head); stage 2 has no use for it."""
        self.text_embeddings = None
        self.lm_head = None
        for block in self._layers():
            block.text_ffn = None

    def _layers(self) -> list[QFormerBlock]:
        return [block for block in self.blocks if isinstance(block, QFormerBlock)]

    def _run(
        self,
        block: QFormerBlock,
        hidden_BSD: Tensor,
        num_queries: int,
        *,
        mask: Tensor | None = None,
        image: KeysValues | None = None,
        past: KeysValues | None = None,
        rows: int | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """One block, kept whole for the backward pass or computed again in it."""
        call = functools.partial(block, num_queries=num_queries, mask=mask, image=image, past=past, rows=rows)
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            # the reentrant kind wants its inputs to need gradients and loses those of captured tensors (image, past)
            output: tuple[Tensor, KeysValues] = checkpoint(call, hidden_BSD, use_reentrant=False)
        else:
            output = call(hidden_BSD)
        return output

    def _embed(self, embeddings_BRD: Tensor) -> Tensor:
        return F.dropout(self.embedding_norm(embeddings_BRD), self.dropout, self.training)

    def _text(self) -> TextEmbeddings:
        assert self.text_embeddings is not None, "the text branch was dropped"
        return self.text_embeddings

    def _initialise(self, initializer_range: float) -> None:
        nn.init.normal_(self.query_tokens, std=initializer_range)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=initializer_range)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight.data[module.padding_idx])


def _select(image: KeysValues | None, more: KeysValues | None, rows_B: Tensor | None) -> KeysValues | None:
    if image is None or rows_B is None:
        return image
    keys, values = image if more is None else (torch.cat([image[0], more[0]]), torch.cat([image[1], more[1]]))
    return keys.index_select(0, rows_B), values.index_select(0, rows_B)


def _check_sizes(
    hidden_size: int, num_heads: int, num_queries: int, cross_attention_every: int, pad_id: int, vocab_size: int
) -> None:
    problems = {
        f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}": hidden_size % num_heads != 0,
        f"num_queries is {num_queries}": num_queries < 1,
        f"cross_attention_every is {cross_attention_every}": cross_attention_every < 1,
        f"pad_id {pad_id} is outside the vocabulary of {vocab_size}": not 0 <= pad_id < vocab_size,
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(problem, where="model.qformer", fix="BERT-base with 32 queries is 768, 12 heads, every 2")
