"""Maps that join a feature with class probabilities, as CDAN does (Long et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from grl_surgery.errors import ShapeError
from grl_surgery.nn.classifiers import check_features
from grl_surgery.nn.pooling import (
    check_tensor,
)
from grl_surgery.validation import check_count

__all__ = ["ConcatenationMap", "MultilinearMap", "RandomizedMultilinearMap"]


class MultilinearMap(nn.Module):
    """Features conditioned on the predicted classes: the outer product of both, f ⊗ softmax(g).

    The multilinear conditioning of CDAN (Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS
    2018). The softmax is detached, so that the domain loss reaches the features but not the class layer.
    Column k C + c of the result is softmax(g)_k f_c, the order of the authors' code, so that weights of their
    discriminators fit.

    Example:
        >>> import torch
        >>> MultilinearMap()(torch.randn(8, 256), torch.randn(8, 10)).shape
        torch.Size([8, 2560])
    """

    def forward(self, features: Tensor, class_logits: Tensor) -> Tensor:
        """Combine.

        Args:
            features: (B, C), floating point.
            class_logits: (B, K), before the softmax.

        Returns:
            (B, C K) in the dtype of the features.

        Raises:
            ShapeError: Not two tensors of those shapes.
        """
        probabilities = _class_probabilities(features, class_logits, "MultilinearMap")
        return (probabilities.unsqueeze(2) * features.unsqueeze(1)).flatten(1)


class RandomizedMultilinearMap(nn.Module):
    """Features conditioned on the predicted classes in ``output_dim`` dimensions: (R_f f) ⊙ (R_g g) / √d.

    The randomised multilinear conditioning of CDAN (Long et al. 2018), which stands in for
    :class:`MultilinearMap` where C K would be too many: inner products are the same in expectation. The two
    matrices have independent standard normal entries, are never trained, and are buffers of the state_dict,
    since a run resumed with other ones would hand its classifier another input. The softmax is detached.

    Example:
        >>> import torch
        >>> RandomizedMultilinearMap(2048, 65)(torch.randn(8, 2048), torch.randn(8, 65)).shape
        torch.Size([8, 1024])

    Args:
        features: Size C of the features.
        classes: Number K of classes.
        output_dim: Size d of the result.
    """

    feature_matrix: Tensor
    class_matrix: Tensor

    def __init__(self, features: int, classes: int, output_dim: int = 1024) -> None:
        super().__init__()
        example = "RandomizedMultilinearMap(2048, 65, output_dim=1024)"
        features = check_count("features", features, example=example)
        classes = check_count("classes", classes, example=example)
        output_dim = check_count("output_dim", output_dim, example=example)
        self.output_dim = output_dim
        self.register_buffer("feature_matrix", torch.randn(features, output_dim))
        self.register_buffer("class_matrix", torch.randn(classes, output_dim))

    def forward(self, features: Tensor, class_logits: Tensor) -> Tensor:
        """Combine.

        Args:
            features: (B, C), floating point.
            class_logits: (B, K), before the softmax.

        Returns:
            (B, d) in the dtype of the features.

        Raises:
            ShapeError: Not two tensors of those shapes.
        """
        name = "RandomizedMultilinearMap"
        probabilities = _class_probabilities(features, class_logits, name)
        example = "RandomizedMultilinearMap(features.shape[1], class_logits.shape[1])"
        check_features(features, self.feature_matrix.shape[0], 2, name, example)
        check_features(class_logits, self.class_matrix.shape[0], 2, f"{name}, for its classes,", example)
        mapped = (features @ self.feature_matrix) * (probabilities @ self.class_matrix)
        return mapped / math.sqrt(self.output_dim)


class ConcatenationMap(nn.Module):
    """Features conditioned on any value by writing it beside them: (f, v), v detached.

    The conditioning of conditional adversarial networks (Mirza & Osindero 2014), for values that are no class
    logits: a regression output, an embedding, an attribute.

    Example:
        >>> import torch
        >>> ConcatenationMap()(torch.randn(8, 256), torch.randn(8, 3)).shape
        torch.Size([8, 259])
    """

    def forward(self, features: Tensor, value: Tensor) -> Tensor:
        """Combine.

        Args:
            features: (B, C), floating point.
            value: (B,) or (B, ...), whose axes after the batch are flattened.

        Returns:
            (B, C + V) in the dtype of the features.

        Raises:
            ShapeError: Not tensors of one batch.
        """
        if check_tensor(features, "ConcatenationMap") and check_tensor(value, "ConcatenationMap"):
            shapes = tuple(features.shape), tuple(value.shape)
            if len(shapes[0]) != 2 or not shapes[1] or shapes[0][0] != shapes[1][0]:
                raise ShapeError(
                    f"ConcatenationMap expects features (B, C) and a value (B, ...) of one batch, got "
                    f"{shapes[0]} and {shapes[1]}",
                    example="ConcatenationMap()(torch.randn(8, 256), torch.randn(8, 3))",
                )
        return torch.cat([features, value.detach().to(features.dtype).reshape(len(value), -1)], dim=1)


def _class_probabilities(features: Tensor, class_logits: Tensor, owner: str) -> Tensor:
    if check_tensor(features, owner) and check_tensor(class_logits, owner):
        shapes = tuple(features.shape), tuple(class_logits.shape)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][0]:
            raise ShapeError(
                f"{owner} expects features (B, C) and class logits (B, K) of one batch, got {shapes[0]} "
                f"and {shapes[1]}",
                example="MultilinearMap()(torch.randn(8, 256), torch.randn(8, 10))",
            )
    return class_logits.detach().softmax(dim=1).to(features.dtype)
