"""Domain heads: what turns a feature into one logit per domain, behind a reversal.

Every classifier here returns logits, never probabilities: a sigmoid or a softmax at its end, followed by a
loss that applies another, trains badly, and a softmax over one logit trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.classifiers import (
    DomainClassifier,
    NumDomains,
    PatchDomainClassifier,
    num_logits,
)
from grl_surgery.nn.pooling import (
    FeaturePool,
    Layout,
    check_tensor,
)
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.validation import check_network

__all__ = [
    "DomainHead",
    "find_heads",
]


_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)
"""What autocast casts by itself."""

_OUT_OF_PLACE = (DomainClassifier, PatchDomainClassifier)


class DomainHead(nn.Module):
    """A reversal, and behind it all that makes domain logits of a feature: pool, condition, classifier.

    The reversal comes first, so every path from the logits to the feature crosses it. The network receives
    exactly -coeff times the gradient that the same head without a reversal would send. The pool, the
    condition and the classifier come after the reversal and get their own gradients unchanged. The class
    logits of a condition are detached, so no gradient flows back through them.

    Example:
        >>> head = DomainHead(DomainClassifier(512), pool=FeaturePool("nchw"), num_domains=2)
        >>> head(torch.randn(8, 512, 7, 7)).shape
        torch.Size([8, 2])
        >>> head.reversal.set_coeff(0.3)

    Args:
        classifier: Module from the pooled feature to logits (B, K) or a map of them (B, K, ...).
        pool: Module from the feature to (B, C); None leaves it as it is.
        condition: Module of (features (B, C), class logits (B, classes)); None for a head without one.
        num_domains: If given, the logits are checked against it; of several attributes, a dict of logits.
        binary: One logit for two domains; see :func:`num_logits`.
        coeff: Initial coefficient of the reversal.
        signed: Whether it may be negative, now or later.
        clip: As for :class:`GradientReversal`.
        normalize: As for :class:`GradientReversal`.
        layout: How the feature was read, for the record.

    Raises:
        SurgeryError: A part is not a module, or a setting is impossible.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        pool: nn.Module | None = None,
        condition: nn.Module | None = None,
        num_domains: NumDomains | None = None,
        binary: bool = False,
        coeff: float = 1.0,
        signed: bool = False,
        clip: float | None = None,
        normalize: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("classifier", classifier), ("pool", pool), ("condition", condition)):
            if part is not None or name == "classifier":
                owner = f"DomainHead, for its {name},"
                check_network(
                    part, owner, example="DomainHead(DomainClassifier(512), pool=FeaturePool('nchw'))"
                )
        self.num_logits = None if num_domains is None else num_logits(num_domains, binary)
        self.layout = layout
        self.reversal = GradientReversal(coeff, signed=signed, clip=clip, normalize=normalize)
        self.pool = pool
        self.condition = condition
        self.classifier = classifier
        self._logits: tuple[Any, bool] | None = None

    # -- logits that stay here, and are not in what the network returns

    @property
    def logits(self) -> Any:
        """The logits of the network's last call, where it was attached with ``outputs="original"``.

        They are those of the last call that ran to its end, in train and in eval mode, and they keep its
        graph alive until the next one. A forward that passes the point several times leaves a tuple. A copy
        or a file of the network begins without any.

        Example:
            >>> from grl_surgery import attach_domain_head
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> x = torch.randn(3, 4)
            >>> m = attach_domain_head(net, after="1", outputs="original", example_inputs=x)
            >>> m(x).shape, m.domain.logits.shape
            (torch.Size([3, 2]), torch.Size([3, 2]))

        Raises:
            SurgeryError: There are none, or gradients are wanted and the call ran without.
        """
        if self._logits is None:
            raise SurgeryError(
                "no call of the network has left logits on this head yet. Only a head that was attached with "
                "outputs='original' keeps any; those of others are in what the network returns",
                example="m = attach_domain_head(model, 'layer3', outputs='original'); m(x); m.domain.logits",
            )
        value, with_graph = self._logits
        if value is None:
            raise SurgeryError(
                "the last call of the network did not come past the point that this head reads, so there are "
                "no logits of it",
                example="insert the head at a point that every call passes",
            )
        if self.training and torch.is_grad_enabled() and not with_graph:
            raise SurgeryError(
                "the last call of the network ran without gradients, so its logits would train nothing: in "
                "torch.no_grad(), or in a checkpoint that is reentrant",
                example="torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False)",
            )
        return value

    def keep_logits(self, logits: Any) -> None:
        """Keep the logits of one call of the network; None if its forward has not passed the point.

        Raises:
            SurgeryError: The way in which the network runs would lose them, such as DataParallel.
        """
        way = _loses_logits(self)
        if way:
            raise SurgeryError(
                f"{way} has no place for logits that a network leaves on its head (outputs='original')",
                example="attach_domain_head(..., outputs='with_logits'), which returns them",
            )
        self._logits = logits, torch.is_grad_enabled()

    @property
    def kept_logits(self) -> Any:
        """Like :attr:`logits`, but None if the last call has not passed the point."""
        return None if self._logits is None else self._logits[0]

    def forget_logits(self) -> None:
        """Begin without logits."""
        self._logits = None

    def __dir__(self) -> list[str]:
        """Names that can be read: torch.jit.trace reads all of them."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name != "logits" or self._logits is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_logits": None}

    def __prepare_scriptable__(self) -> DomainHead:
        """Where torch.jit.script asks first: it cannot read the settings."""
        raise SurgeryError(
            "torch.jit.script cannot read a domain head; trace it instead, which keeps the reversal",
            example="torch.jit.trace(head, features)",
        )

    def forward(
        self, features: Tensor, class_logits: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        """Classify the domain.

        Args:
            features: The feature at the point, floating point. It may be a nested tensor, whose padding then
                counts for nothing, and of another precision than the head, in which it is then computed.
            class_logits: (B, classes), or another value to be conditioned on, for a conditional head; for a
                head with a masked pool and no condition, the mask or the lengths that the pool reads.
            mask: The mask or the lengths, for a conditional head with a masked pool. Without one all
                positions count, as where a network is called without its attention mask.

        Returns:
            Logits (B, K), or what the classifier makes of the feature; a dict of logits by attribute.

        Raises:
            SurgeryError: Class logits are missing, or they or a mask are not wanted.
            ShapeError: The feature does not fit, or the classifier's output does not.
        """
        counts = None
        if check_tensor(features, "DomainHead") and features.is_nested:
            features, counts = _unnested(features)
        hidden = self._cast(self.reversal(features))
        masked = isinstance(self.pool, FeaturePool) and bool(self.pool.masked)
        if masked and self.condition is None and not isinstance(mask, Tensor):
            class_logits, mask = None, class_logits
        if isinstance(mask, Tensor) and not masked:
            raise SurgeryError(
                "this head's pool reads no mask, but was given one",
                example="FeaturePool('nlc', masked='valid')",
            )
        if isinstance(self.pool, FeaturePool) and masked and mask is not None and counts is None:
            hidden = self.pool(hidden, mask)
        elif isinstance(self.pool, FeaturePool):
            hidden = self.pool.unmasked(hidden, counts)
        elif self.pool is not None:
            hidden = self.pool(hidden.clone())
        logits = self.classifier(self._conditioned(hidden, class_logits))
        if isinstance(self.num_logits, Mapping):
            self._check_attributes(logits)
            for name, count in self.num_logits.items():
                self._check_logits(logits[name], features, count)
        else:
            self._check_logits(logits, features, self.num_logits)
        return logits

    def _cast(self, hidden: Tensor) -> Tensor:
        """The feature in the precision of the head's parameters, unless autocast sees to that."""
        if not check_tensor(hidden, "DomainHead"):
            return hidden
        may_be_cast = hidden.dtype in _AUTOCAST and hidden.device.type != "meta"
        if may_be_cast and torch.is_autocast_enabled(hidden.device.type):
            return hidden
        dtypes = [p.dtype for p in self.parameters() if p.is_floating_point()]
        own = dtypes[0] if dtypes else hidden.dtype
        return hidden if hidden.dtype == own else hidden.to(own)

    def _conditioned(self, hidden: Tensor, class_logits: Tensor | None) -> Tensor:
        if self.condition is None and class_logits is None:
            # The reversal shares memory with the feature, which the network goes on to read: a foreign
            # classifier that begins with an in-place operation must not write into it.
            return hidden if isinstance(self.classifier, _OUT_OF_PLACE) else hidden.clone()
        if self.condition is None:
            raise SurgeryError(
                "this head has no condition, but was given class logits",
                example="DomainHead(classifier, condition=MultilinearMap())",
            )
        if class_logits is None:
            raise SurgeryError(
                "this head is conditioned on the predicted classes, but was given no class logits",
                example="head(features, class_logits)",
            )
        conditioned: Tensor = self.condition(hidden, class_logits)
        return conditioned

    def _check_attributes(self, logits: object) -> None:
        wanted = list(cast(Mapping[str, int], self.num_logits))
        if isinstance(logits, fx.Proxy) or (isinstance(logits, Mapping) and [*logits] == wanted):
            return
        found = f"a dict of {', '.join(map(repr, logits))}" if isinstance(logits, Mapping) else "no dict"
        raise ShapeError(
            f"{type(self.classifier).__name__} returned {found}, but this head needs a dict of logits for "
            f"{', '.join(map(repr, wanted))}",
            example="DomainClassifier(512, num_domains={'site': 3, 'scanner': 2})",
        )

    def _check_logits(self, logits: object, features: Tensor, count: int | None) -> None:
        if count is None or isinstance(logits, fx.Proxy):
            return
        if not isinstance(logits, Tensor):
            raise ShapeError(
                f"{type(self.classifier).__name__} returned {type(logits).__name__}, not a tensor of logits",
                example=f"a classifier whose forward returns (B, {count})",
            )
        shape, batch = tuple(logits.shape), features.shape[self._batch_axis()]
        columns = 1 if len(shape) == 1 and count == 1 else shape[1] if len(shape) > 1 else 0
        if columns != count or shape[0] != batch:
            raise ShapeError(
                f"{type(self.classifier).__name__} returned logits of shape {shape}, but this head needs "
                f"({batch}, {count}), one logit for each domain, or a map of them",
                example=f"a last layer nn.Linear(1024, {count}), without a softmax",
            )

    def _batch_axis(self) -> int:
        """The axis of the feature that is the batch."""
        known = self.layout.name if self.layout else getattr(self.pool, "layout", "n")
        return str(known).index("n")

    def extra_repr(self) -> str:
        """How the feature was read."""
        return f"reads {self.layout}" if self.layout else ""


def _loses_logits(head: nn.Module) -> str:
    """What runs the network in such a way that what it leaves on a head is lost; empty where nothing does."""
    if torch.compiler.is_exporting():
        return "a program of torch.export"
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "a graph of torch.jit.trace"
    if getattr(head, "_is_replica", False):
        return "DataParallel, which runs copies of the network,"
    # torch keeps there which network of DistributedDataParallel is running, and offers no other way to ask.
    parallel: Any = None if torch.compiler.is_compiling() else nn.parallel.DistributedDataParallel
    running = getattr(parallel, "_active_ddp_module", None)
    if running is not None and running.find_unused_parameters and not running.static_graph:
        return "DistributedDataParallel(find_unused_parameters=True), which looks for the head in the output,"
    return ""


def _unnested(features: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as a padded one, and (B, L), 1 where a position is no padding."""
    lengths = torch.tensor([len(part) for part in features.unbind()], device=features.device)
    padded = torch.nested.to_padded_tensor(features, 0.0)
    places = torch.arange(padded.shape[1], device=padded.device)
    return padded, (places < lengths[:, None]).to(padded.dtype)


def find_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The domain heads in a network by module path, in the order of registration.

    A head is a :class:`DomainHead`, or what is left of one after its forward was traced into: a module
    with a reversal called ``reversal`` beside a ``classifier``.

    Example:
        >>> head = DomainHead(DomainClassifier(4))
        >>> list(find_heads(nn.ModuleDict({"backbone": nn.Linear(4, 4), "domain": head})))
        ['domain']

    Raises:
        SurgeryError: It is not a network.
    """
    check_network(model, "find_heads")
    return {name: module for name, module in model.named_modules() if _is_head(module)}


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, DomainHead):
        return True
    children = dict(module.named_children())
    return isinstance(children.get("reversal"), GradientReversal) and "classifier" in children
