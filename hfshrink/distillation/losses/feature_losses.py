"""Losses that look inside the models: hidden states, attention, relations, feature maps.

The objects here carry the settings; `prepare` fits them to two models (`matching`), and the maths is in `features`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hfshrink.distillation.checks import check_choice, check_counts, check_flags, check_number, check_weights
from hfshrink.distillation.losses.matching import (
    DISTANCES,
    STATES,
    MatchedAttention,
    MatchedFeatureMaps,
    MatchedHidden,
    MatchedRelations,
)
from hfshrink.errors import SettingError


@dataclass(frozen=True)
class HiddenLoss:
    """Hidden states of matched layers, and the embeddings' output (TinyBERT, arXiv:1909.10351).

    The mean over the matched pairs of layers (the papers sum, so their factors are to be multiplied by the number of
    pairs). Where the widths differ, the student's states go through a learned matrix: one that all layers share, one
    for the embeddings. PKD (arXiv:1908.09355) is `HiddenLoss(layers="skip", first_token=True, normalize=True)`.

    `layers="nearest"` teaches a student that is being pruned (CoFi, arXiv:2204.00408): four layers of the teacher,
    evenly spread (`teaching_layers`), teach by L = mean_j d(H_S^(m_j) W, H_T^(j)), where m_1 < m_2 < … are the
    student's layers of least total distance in this very batch (`match_rising`). The match has no gradient, the
    distances of the chosen layers have. CoFi's W starts as the identity and is learned; here it stays the identity
    where the widths agree, as heads and neurons leave them, and is the shared learned matrix where they differ.

    Attributes:
        layers: Which student layer matches which teacher layer: see `map_layers`, or "nearest".
        distance: "mse" (`hidden_mse`) or "cosine" (`cosine_distance`, as in DistilBERT).
        first_token: Compare the first position only, which classifiers of the BERT family read.
        normalize: Scale each state to length 1 first (`normalized_distance`).
        embeddings: Also compare what enters the first layer; None does so unless `first_token` or "nearest" is set.
        projection: False refuses models of different widths.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"num_attention_heads": 1, "intermediate_size": 8}
        >>> teacher = BertModel(BertConfig(hidden_size=16, num_hidden_layers=4, **sizes))
        >>> student = BertModel(BertConfig(hidden_size=8, num_hidden_layers=2, **sizes))
        >>> part = HiddenLoss().prepare(student, teacher)
        >>> [name for name, _ in part.named_parameters()], part.teacher_wants.outputs
        (['layer_projection.weight', 'embedding_projection.weight'], ('encoder.layer.1', 'encoder.layer.3'))
        >>> part = HiddenLoss(layers="nearest").prepare(teacher, teacher)
        >>> part.teacher_wants.outputs == tuple(f"encoder.layer.{i}" for i in range(4))
        True
    """

    layers: str | Mapping[int, int] = "uniform"
    distance: str = "mse"
    first_token: bool = False
    normalize: bool = False
    embeddings: bool | None = None
    projection: bool = True
    weight: float = 1.0
    final_weight: float | None = None
    name = "hidden"

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)
        check_choice("distance", self.distance, DISTANCES)
        check_flags(first_token=self.first_token, normalize=self.normalize, projection=self.projection)
        if self.embeddings is not None:
            check_flags(embeddings=self.embeddings)
        if self.normalize and self.distance == "cosine":
            raise SettingError('distance="cosine" ignores lengths already: leave out normalize=True.')

    def prepare(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """The loss for these two models, with the projections that it needs.

        Raises:
            SettingError: Layers that are not there; different widths with `projection=False`.
            UnsupportedModelError: A model without a single stack of layers.
        """
        return MatchedHidden(self, student, teacher)


@dataclass(frozen=True)
class AttentionLoss:
    """Attention scores of matched layers before the softmax, over pairs without padding (TinyBERT, arXiv:1909.10351).

    The mean over the matched pairs of layers. Pairs that one of the models may not look at are left out: the future in
    causal models, what lies outside a window.

    Attributes:
        layers: Which student layer matches which teacher layer, see `map_layers`.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> AttentionLoss().prepare(BertModel(config), BertModel(config)).student_wants.attention
        (0, 1)
    """

    layers: str | Mapping[int, int] = "uniform"
    weight: float = 1.0
    final_weight: float | None = None
    name = "attention"

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """The loss for these two models.

        Raises:
            SettingError: Layers that are not there; different numbers of heads.
            UnsupportedModelError: A family whose attention can't be read.
        """
        return MatchedAttention(self, student, teacher)


@dataclass(frozen=True)
class RelationLoss:
    """Relations among queries, among keys and among values of one layer (MiniLMv2, arXiv:2012.15828).

    The mean of the three (by their weights). Needs neither projections nor equal widths, heads or depths, and so is
    the first choice for a student of any shape. See `relation_loss` for causal models.

    Attributes:
        student_layer: Layer of the student; negative numbers count from the end.
        teacher_layer: Layer of the teacher. The last suits base models; the paper takes 21 of 24 for large ones.
        relation_heads: Heads of the relations, a divisor of all widths; None takes `default_relation_heads`.
        query_weight: Share of the relations among queries.
        key_weight: Share of the relations among keys.
        value_weight: Share of the relations among values.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
        >>> part = RelationLoss(student_layer=1).prepare(BertModel(config), BertModel(config))
        >>> part.relation_heads, part.student_wants.attention, part.teacher_wants.attention
        (2, (1,), (2,))
    """

    student_layer: int = -1
    teacher_layer: int = -1
    relation_heads: int | None = None
    query_weight: float = 1.0
    key_weight: float = 1.0
    value_weight: float = 1.0
    weight: float = 1.0
    final_weight: float | None = None
    name = "relations"

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)
        for kind in STATES:
            check_number(f"{kind}_weight", self.share(kind), "of at least 0", lambda value: value >= 0)
        if not sum(self.share(kind) for kind in STATES):
            raise SettingError("query_weight, key_weight and value_weight are all 0: there is nothing to compare.")
        if self.relation_heads is not None:
            check_counts(relation_heads=self.relation_heads)

    def share(self, kind: str) -> float:
        """The weight of "query", "key" or "value"."""
        return getattr(self, f"{kind}_weight")

    def prepare(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """The loss for these two models.

        Raises:
            SettingError: Layers that are not there; `relation_heads` divides not all widths.
            UnsupportedModelError: A family whose attention can't be read.
        """
        return MatchedRelations(self, student, teacher)


@dataclass(frozen=True)
class FeatureMapLoss:
    """Feature maps of convolutional models, stage by stage (in the manner of FitNets, arXiv:1412.6550).

    The mean over the matched stages. Where the channels differ, the student's maps go through a learned 1×1
    convolution.

    Attributes:
        stages: {student module: teacher module} by name. None matches the last block at each size of the maps.
        projection: False refuses different numbers of channels.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.

    Example:
        >>> from transformers import ResNetConfig, ResNetModel
        >>> sizes = {"embedding_size": 4, "depths": [1, 1], "layer_type": "basic"}
        >>> student = ResNetModel(ResNetConfig(hidden_sizes=[4, 8], **sizes))
        >>> teacher = ResNetModel(ResNetConfig(hidden_sizes=[8, 8], **sizes))
        >>> part = FeatureMapLoss().prepare(student, teacher)
        >>> part.student_wants.outputs, [name for name, _ in part.named_parameters()]
        (('encoder.stages.0', 'encoder.stages.1'), ['projections.0.weight'])
    """

    stages: Mapping[str, str] | None = None
    projection: bool = True
    weight: float = 1.0
    final_weight: float | None = None
    name = "feature_maps"

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)
        check_flags(projection=self.projection)
        if self.stages is not None and (not isinstance(self.stages, Mapping) or not self.stages):
            raise SettingError(f"stages must be a mapping {{student module: teacher module}}, got {self.stages!r}.")

    def prepare(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """The loss for these two models, with the projections that it needs.

        Raises:
            SettingError: Modules that are not there; different channels with `projection=False`.
            UnsupportedModelError: A model without feature maps.
        """
        return MatchedFeatureMaps(self, student, teacher)
