"""What many tests compare with: gradients by plain backward, and all that surgery must leave alone."""

from __future__ import annotations

import copy

import torch

import grl_surgery as gs


def names(model, depth=1):
    return [node.name for node in gs.graph(model, depth=depth).nodes]


def gradients(model, *inputs, **keywords):
    """Gradient of every parameter under a random objective, by name."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    output = model(*inputs, **keywords)
    tensors = list(output.values()) if isinstance(output, dict) else output
    tensors = tensors if isinstance(tensors, (tuple, list)) else [tensors]
    generator = torch.Generator().manual_seed(7)
    sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def reversed_at(model, path, *inputs):
    """Gradients of the model with the output of the module at ``path`` reversed by a tensor hook."""

    def hook(module, args, output):
        copied = output.clone()
        copied.register_hook(lambda gradient: -gradient)
        return copied

    model = copy.deepcopy(model)
    model.get_submodule(path).register_forward_hook(hook)
    return gradients(model, *inputs)


def assert_same_gradients(found, expected):
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], gradient), name


def snapshot(model):
    """Everything about a model that surgery must not touch."""
    return {
        "keys": list(model.state_dict()),
        "tensors": [t.clone() for t in model.state_dict().values()],
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "flags": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
        "children": [list(module._modules) for module in model.modules()],
        "random": torch.random.get_rng_state(),
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert all(map(torch.equal, after.pop("tensors"), before.pop("tensors")))
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before
