"""CDAN (Long et al. 2018): the domain head reads each feature together with the predicted class.

The data and the network are those of examples/cnn.py. The head is conditioned on the class logits. Samples
with a confident prediction count more (CDAN+E).

    python examples/cdan.py
"""

from __future__ import annotations

import torch
from cnn import Network, accuracy, parse, plainly, train
from digits import load_domains
from torch import Tensor

import grl_surgery as gs


def conditionally(outputs: tuple[Tensor, Tensor], labels: Tensor, of_domain: Tensor) -> Tensor:
    """The loss of the source's labels, and the domain loss weighted by how sure the network is."""
    logits, domain_logits = outputs
    weights = gs.entropy_weights(logits, of_domain)
    return plainly(logits, labels, of_domain) + gs.domain_loss(domain_logits, of_domain, weights=weights)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    domains = load_domains(count=args.count)
    images, _ = domains.source.batch(torch.arange(4))
    for seed in args.seeds:
        torch.manual_seed(seed)
        network = Network()
        m = gs.attach_domain_head(
            network,
            after="classify.1",
            condition_on="classify",
            hidden=100,
            depth=1,
            dropout=0.0,
            example_inputs=images,
        )
        print(gs.verify_flip(m, reference=network, example_inputs=images).raise_if_failed().verdict)
        train(m, domains, conditionally, args.steps, args.coeff)
        trained = gs.strip(m)
        source, target = accuracy(trained, domains.source_test), accuracy(trained, domains.target_test)
        print(f"seed {seed}  CDAN+E  source {source:.3f}  target {target:.3f}")


if __name__ == "__main__":
    main()
