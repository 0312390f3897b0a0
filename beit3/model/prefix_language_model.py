"""A causal language model that reads a picture as a prefix of embeddings, in front of its text.

One sequence is `opening | prefix | text`: words that stand before every picture, the picture, and a text of its own.

Shapes: B pictures, D width of the tower's features, N patches, E embedding width of the language model, V its
vocabulary, O ids of the opening, P embeddings of the prefix, T ids of the longest text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from beit3.config import check_types, config, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ConnectorKind = Literal["clipcap_transformer", "clipcap_mlp", "llava_linear", "llava_mlp"]
_MAPPER_MLP_RATIO = 2.0
"""Hidden width of the feed-forward parts of ClipCap's mapper, in units of E."""


@config
class ConnectorConfig:
    """What turns a tower's features into a prefix."""

    kind: ConnectorKind = "clipcap_transformer"
    """`clipcap_...` read the pooled feature, `llava_...` the patches; `llava_linear` is LLaVA's, `llava_mlp` 1.5's."""
    prefix_length: int = 40
    """P of the ClipCap mappers (paper: 40 for the transformer, 10 for the MLP); patches give a prefix of N."""
    clip_length: int = 40
    """Tokens that `clipcap_transformer` spreads the feature over."""
    num_layers: int = 8
    """Of `clipcap_transformer`."""
    num_heads: int = 8
    """Of `clipcap_transformer`."""

    def __post_init__(self) -> None:
        check_types(self, "connector")
        require(self.kind in get_args(ConnectorKind), f"connector.kind must be one of {get_args(ConnectorKind)}")
        for name in ("prefix_length", "clip_length", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, f"connector.{name} must be at least 1, not {getattr(self, name)}")

    @property
    def reads_patches(self) -> bool:
        """Whether it takes (B, N, D) instead of (B, D)."""
        return self.kind.startswith("llava")

    def build(self, feature_width: int, embedding_width: int) -> nn.Module:
        """Build the connector with random weights.

        Args:
            feature_width: D.
            embedding_width: E.

        Raises:
            ConfigError: E does not divide into `num_heads`.
        """
        if self.kind == "clipcap_transformer":
            require(
                embedding_width % self.num_heads == 0,
                f"connector.num_heads {self.num_heads} does not divide the language model's width {embedding_width}",
            )
            return TransformerMapper(feature_width, embedding_width, self)
        if self.kind == "clipcap_mlp":
            return MLPMapper(feature_width, embedding_width, self.prefix_length)
        if self.kind == "llava_linear":
            return nn.Linear(feature_width, embedding_width)
        return nn.Sequential(
            nn.Linear(feature_width, embedding_width), nn.GELU(), nn.Linear(embedding_width, embedding_width)
        )


class TransformerMapper(nn.Module):
    """ClipCap's mapping network: the feature as tokens beside learned constants; what becomes of these is the prefix.

    Source: ClipCap (2111.09734), section 3.2 and `TransformerMapper` of its code: pre-norm blocks with ReLU, no biases
    of queries, keys and values, no norm at the end.
    """

    def __init__(self, feature_width: int, embedding_width: int, config: ConnectorConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_width, config.clip_length * embedding_width)
        self.constants = nn.Parameter(torch.randn(config.prefix_length, embedding_width))
        self.blocks = nn.Sequential(
            *(
                Block(embedding_width, config.num_heads, mlp_ratio=_MAPPER_MLP_RATIO, act_layer=nn.ReLU)
                for _ in range(config.num_layers)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to a prefix (B, P, E)."""
        length, width = self.constants.shape
        tokens = self.linear(features).unflatten(1, (-1, width))  # (B, clip_length, E)
        constants = self.constants.expand(len(features), -1, -1)
        mixed: Tensor = self.blocks(torch.cat([tokens, constants], dim=1))
        return mixed[:, -length:]


class MLPMapper(nn.Module):
    """ClipCap's other mapper: one hidden layer, half as wide as the whole prefix, with a hyperbolic tangent.

    Source: ClipCap (2111.09734), section 3.3 and `MLP` of its code; meant for a language model that is trained too.
    """

    def __init__(self, feature_width: int, embedding_width: int, prefix_length: int) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        whole = prefix_length * embedding_width
        self.layers = nn.Sequential(nn.Linear(feature_width, whole // 2), nn.Tanh(), nn.Linear(whole // 2, whole))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to a prefix (B, P, E)."""
        prefix: Tensor = self.layers(features).unflatten(1, (self.prefix_length, -1))
        return prefix


class PrefixLanguageModel(nn.Module):
    """A connector in front of any causal language model of transformers.

    A frozen language model stays in eval mode and out of the state dict; it follows to other devices.

    Args:
        language_model: takes `inputs_embeds`; its defaults of generation are cleared.
        connector: from features to (B, P, E).
        opening: ids before every picture, such as `<s>`.
        trains_language_model: whether its weights are trained and part of the state dict.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        connector: nn.Module,
        *,
        opening: Sequence[int] = (),
        trains_language_model: bool = False,
    ) -> None:
        super().__init__()
        self.connector = connector
        self.opening = tuple(opening)
        self._language_model: tuple[Any] = (language_model,)  # a tuple, which torch does not search for modules
        if trains_language_model:
            self.trained_language_model = language_model
        model: Any = language_model
        model.requires_grad_(trains_language_model).train(trains_language_model)
        model.generation_config = type(model.generation_config)()
        self._num_multiplied = _count_multiplied(model)
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def language_model(self) -> Any:
        """The language model of transformers, frozen or not."""
        return self._language_model[0]

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model is trained."""
        return "trained_language_model" in self._modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixLanguageModel:
        if not self.trains_language_model:
            self.language_model._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, features: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Predict each id of the texts from the picture and the ids before it.

        Args:
            features: (B, D), or (B, N, D) for a connector that reads patches.
            text_ids: (B, T) int64, padded at the right with any id.
            text_mask: (B, T) bool, True = real id.

        Returns:
            Logits (B, T, V): row t is the prediction of `text_ids[:, t]`.
        """
        embeddings, mask = self._sequences(features, text_ids, text_mask)
        kept = text_ids.shape[1] + 1  # from the last place of the prefix on
        options = {"logits_to_keep": kept} if self._keeps_last else {}
        out = self.language_model(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False, **options)
        logits: Tensor = out.logits
        return logits[:, -kept:-1]

    def loss(self, features: Tensor, text_ids: Tensor, text_mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the target ids, each predicted from all that truly stands before it.

        Args:
            features: as in `forward`.
            text_ids: as in `forward`.
            text_mask: as in `forward`.
            targets: (B, T) bool, True = an id to learn; prompts and padding are False.

        Returns:
            The mean over all targets of the batch, and the share of them that are the likeliest id; scalars.
        """
        logits = self(features, text_ids, text_mask)[targets].float()
        words = text_ids[targets]
        return F.cross_entropy(logits, words), (logits.argmax(1) == words).float().mean()

    @torch.no_grad()
    def generate(
        self,
        features: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        *,
        end_id: int,
        max_new_tokens: int,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Tensor:
        """Continue prompts by the likeliest ids, greedily or by beam search.

        Args:
            features: as in `forward`.
            text_ids: prompts (B, T) int64, padded at the right; T may be 0.
            text_mask: (B, T) bool.
            end_id: ends a text, and fills what lies behind it.
            max_new_tokens: most ids of a text.
            num_beams: 1 is greedy.
            length_penalty: a beam's log-probability is divided by its length to this power.

        Returns:
            The new ids (B, L) int64, L the longest of them.
        """
        from transformers import GenerationConfig

        embeddings, mask = self._sequences(features, text_ids, text_mask)
        order = mask.int().argsort(dim=1, stable=True)  # padding to the left, where the texts are to be continued
        embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
        settings: Any = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
            do_sample=False,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
        found: Tensor = self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask.gather(1, order).long(), generation_config=settings
        )
        return found

    def forward_flops(self, length: int) -> float:
        """Operations of the language model on one sequence: 2 for each weight of a matrix, and attention.

        As in `beit3.model.flops`; logits are counted at every place.
        """
        settings = self.language_model.config
        attention = 4.0 * int(settings.num_hidden_layers) * int(settings.hidden_size) * length**2
        return 2.0 * self._num_multiplied * length + attention

    def _sequences(self, features: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, O + P + T, E) of opening, picture and text, and which of them are real (B, O + P + T)."""
        embed = self.language_model.get_input_embeddings()
        prefix = self.connector(features)
        opening = torch.tensor(self.opening, dtype=torch.int64, device=text_ids.device)
        before = embed(opening).expand(len(prefix), -1, -1)
        embeddings = torch.cat([before, prefix.to(before.dtype), embed(text_ids)], dim=1)
        length = embeddings.shape[1] - text_ids.shape[1]
        return embeddings, torch.cat([text_mask.new_ones(len(prefix), length), text_mask], dim=1)


def _count_multiplied(model: Any) -> int:
    """Weights that each token is multiplied by: all but tables that are only looked up."""
    tables = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Embedding))
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return int(sum(weight.numel() for weight in model.parameters()) - tables + (head is words) * head.numel())
