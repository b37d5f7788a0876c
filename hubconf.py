"""torch.hub one-liners: ``torch.hub.load(REPOSITORY, "insert_grl", "timm/resnet18", after="layer3")``."""

from typing import Any

from torch import nn

dependencies = ["torch", "timm", "torchvision"]


def insert_grl(network: str, pretrained: bool = False, **where: Any) -> nn.Module:
    """A network by name with a reversal in it.

    Args:
        network: ``"timm/resnet18"``, ``"torchvision/resnet18"``.
        pretrained: Load its weights.
        where: As for :func:`grl_surgery.insert_grl`: ``after="layer3"``, ``coeff=0.5``.
    """
    import grl_surgery as gs
    from grl_surgery.loading.model_zoo import load_model

    return gs.insert_grl(load_model(network, pretrained=pretrained).module, **where)


def attach_domain_head(network: str, pretrained: bool = False, **settings: Any) -> nn.Module:
    """A network by name with a domain head behind one of its points.

    Args:
        network: ``"timm/resnet18"``, ``"torchvision/resnet18"``.
        pretrained: Load its weights.
        settings: As for :func:`grl_surgery.attach_domain_head`: ``after="global_pool"``, ``num_domains=3``.
    """
    import grl_surgery as gs
    from grl_surgery.loading.model_zoo import load_model

    return gs.attach_domain_head(load_model(network, pretrained=pretrained).module, **settings)
