"""Calls a class or a function of a library with small values for its required arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.loading.trial_inputs import first_that_runs

__all__ = ["built_and_run"]

# What an argument of this name may be; the first one that builds and runs is taken.
_SMALL: dict[str, tuple[Any, ...]] = {
    "spatial_dims": (2, 3),
    "in_channels": (3, 8),
    "out_channels": (2,),
    "unet_out_channels": (8,),
    "num_classes": (3,),
    "classes": (3,),
    "num_class": (3,),
    "channels": ((8, 16, 32), 8),
    "strides": ((2, 2), (2, 2, 2)),
    "in_shape": ((3, 64, 64),),
    "out_shape": ((4,),),
    "latent_size": (8,),
    "latent_shape": ((8,),),
    "start_shape": ((8, 4, 4),),
    "img_size": ((64, 64), (32, 32, 32), 64),
    "image_size": (64, (64, 64)),
    "input_image_size": ((32, 32, 32), (64, 64)),
    "patch_size": (16, (16, 16)),
    "hidden_size": (32,),
    "mlp_dim": (64,),
    "num_layers": (2,),
    "num_heads": (4,),
    "num_channel_initial": (8,),
    "depth": (2,),
    "extract_levels": ((0, 1, 2),),
    "label_nc": (3,),
    "num_d": (2,),
    "num_layers_d": (2,),
    "hidden_channels": (16, (16, 16)),
    "kernel_size": ((3, 3, 3), 3),
    "upsample_kernel_size": ((2, 2),),
    "embedding_dim": (16,),
    "edge_dim": (4,),
    "num_timesteps": (2,),
    "num_nodes": (12,),
    "num_blocks": (2,),
    "num_bilinear": (4,),
    "num_spherical": (3,),
    "num_radial": (4,),
    "int_emb_size": (8,),
    "basis_emb_size": (8,),
    "out_emb_channels": (8,),
    "hidden_node_channels": (8,),
    "hidden_edge_channels": (8,),
    "input_dim": (40,),
    "input_size": (40,),
    "ffn_dim": (64,),
    "depthwise_conv_kernel_size": (7,),
    "n_feature": (40,),
    "segment_length": (4,),
    "right_context_length": (1,),
    "num_sources": (2,),
    "sources": (["a", "b"],),
    "block_inplanes": ((8, 16, 32, 64),),
    "layers": ((1, 1, 1, 1),),
    "planes": (8,),
    "in_planes": (8,),
    "num_tokens": (32,),
    "max_seq_len": (16,),
    "attn_layers_dim": (32,),
    "attn_layers_depth": (2,),
    "attn_layers_heads": (4,),
    "n_classes": (3,),
    "tgt_vocab": (32,),
    "d_model": (32,),
    "nhead": (4,),
}


def built_and_run(make: Callable[..., Any], name: str, given: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The network that a class or a function makes, and inputs on which it runs, or None.

    Args:
        make: Of the library.
        name: By which the user asked for it.
        given: Arguments; those that ``make`` asks for besides are small, by their names.

    Raises:
        SurgeryError: It cannot be made, with what its last failure was and which arguments it takes.
    """
    built, problem = None, ""
    for arguments in _arguments(make, given):
        try:
            built = make(**arguments)
        except MemoryError:
            raise
        except Exception as error:
            problem = problem or one_line(error)
            continue
        if not isinstance(built, nn.Module):
            raise SurgeryError(f"{name} makes a {type(built).__name__}, not a network")
        inputs = first_that_runs(built, _inputs(built, arguments), limit=200)
        if inputs is not None:
            return built, inputs
    if built is not None:
        return built, None
    parameters = inspect.signature(make).parameters
    takes = ", ".join(str(p) for p in list(parameters.values())[:8])
    raise SurgeryError(
        f"{name} cannot be made: {problem or 'it asks for arguments that only you know'}; it takes ({takes})",
        example=f"{name.partition('?')[0]}?{next(iter(parameters), 'argument')}=2",
    )


def _arguments(make: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    parameters = inspect.signature(make).parameters.values()
    asked = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in asked if name not in given]
    if all(name in _SMALL for name in missing):
        for values in itertools.islice(itertools.product(*(_SMALL[name] for name in missing)), 12):
            yield {**dict(zip(missing, values, strict=True)), **given}


# --------------------------------------------------------------------------------------------- inputs


def _inputs(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any] | tuple[Any, ...]]:
    """What the arguments that forward asks for may be: images, volumes, sounds, sequences or graphs."""
    parameters = inspect.signature(model.forward).parameters.values()
    asked = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    names = {p.name for p in parameters}
    if not asked:
        asked = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][:1]
    graph = bool({"edge_index", "pos"} & names)
    optional = [p.name for p in parameters if p.default is None and p.name not in (*asked, *_LEFT_OUT)]
    for main in _graphs(arguments) if graph else _tensors(arguments):
        values = [main if i == 0 else None for i in range(len(asked))]
        rest = [_others(name, main, arguments) for name in asked[1:]]
        if asked and _others(asked[0], main, arguments) and (graph and asked[0] != "x"):
            values[0] = _others(asked[0], main, arguments)[0]
        more = {name: made[0] for name in optional if (made := _others(name, main, arguments))}
        for extra in ({}, more) if more and asked and not graph else ({},):
            for chosen in itertools.islice(itertools.product(*rest), 4):
                yield {**dict(zip(asked, [values[0], *chosen], strict=True)), **extra}
    var_args = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    if var_args and not asked:
        for main in _tensors(arguments):
            yield (main,)


# How wide what an encoder hands over is.
_ENCODED = ("caption_channels", "joint_attention_dim", "embedding_dim", "cross_attention_dim")
# Arguments that forward does without: an objective, or masks of everything.
_LEFT_OUT = ("target", "y", "encoder_attention_mask", "seg", "lengths", "lens", "batch")


def _tensors(arguments: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = ("img_size", "image_size", "input_image_size", "sample_size")
    size = next((arguments[name] for name in sides if name in arguments), None)
    known = arguments.get(
        "in_channels", arguments.get("input_dim", arguments.get("input_size", arguments.get("n_feature")))
    )
    shape = arguments.get("in_shape", arguments.get("latent_shape", arguments.get("input_shape")))
    channels = [c for c in (known, 3, 1, 2, 4) if isinstance(c, int)]
    sizes: list[tuple[int, ...]] = []
    if isinstance(shape, (tuple, list)):
        sizes.append((2, *shape))
    for count in dict.fromkeys(channels):
        if isinstance(size, (tuple, list)):
            sizes.append((2, count, *size))
        if isinstance(size, int):
            sizes += [(2, count, size, size), (2, count, size, size, size)]
        sizes += [(2, count, side, side) for side in (32, 64, 16, 128)]
        sizes += [(2, count, side, side, side) for side in (16, 32, 64)]
    sizes += [(2, 2, 3, 64, 64)]
    width = known if isinstance(known, int) else 40
    sizes += [
        (2, 20, width),
        (2, width, 40),
        (2, width),
        (2, 4000),
        (2, 1, 4000),
        (2, 16000),
        (2, 80, 40),
        (2, 40, 80),
        (2, 1024),
        (2, 2, 16000),
        (2, 513, 40),
        (2, 20, 32),
    ]
    for each in dict.fromkeys(sizes):
        yield torch.randn(*each, generator=generator)
    yield torch.randint(1, 20, (2, 9), generator=generator)


def _graphs(arguments: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for width in (arguments.get("in_channels"), 8, 16):
        if isinstance(width, int):
            yield torch.randn(12, width, generator=generator)
    yield torch.randint(1, 9, (12,), generator=generator)


def _others(name: str, main: torch.Tensor, arguments: Mapping[str, Any]) -> list[Any]:
    """What an argument beside the main one may be."""
    generator = torch.Generator().manual_seed(1)
    batch = main.shape[0]
    edges = torch.randint(0, 12, (2, 30), generator=generator)
    length = main.shape[1] if main.dim() > 1 else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rules: dict[str, Callable[[], list[Any]]] = {
        "edge_index": lambda: [edges],
        "edge_attr": lambda: [normal(30, arguments.get("edge_dim", 4))],
        "edge_weight": lambda: [torch.rand(30, generator=generator)],
        "edge_type": lambda: [torch.randint(0, 2, (30,), generator=generator)],
        "batch": lambda: [torch.zeros(12, dtype=torch.int64)],
        "z": lambda: [torch.randint(1, 9, (12,), generator=generator)],
        "pos": lambda: [normal(12, 3)],
        "timestep": lambda: [torch.tensor([3] * batch)],
        "timesteps": lambda: [torch.tensor([3] * batch)],
        "t": lambda: [torch.tensor([3] * batch)],
        "encoder_hidden_states": lambda: [
            normal(batch, 7, int(next((arguments[name] for name in _ENCODED if name in arguments), 32)))
        ],
        "context": lambda: [normal(batch, 7, int(arguments.get("cross_attention_dim", 32)))],
        "lengths": lambda: [torch.full((batch,), length), torch.ones(batch)],
        "lens": lambda: [torch.ones(batch)],
        "seg": lambda: [normal(batch, arguments.get("label_nc", 3), *main.shape[2:])],
        "specgram": lambda: [normal(batch, 1, 80, 10)],
        "src": lambda: [main],
        "tgt": lambda: [torch.randint(1, 20, (batch, 5), generator=generator)],
        "target": lambda: [torch.randn(main.shape, generator=generator)],
        "y": lambda: [torch.randn(main.shape, generator=generator)],
        "references": lambda: [torch.randn(main.shape, generator=generator)],
        "controlnet_cond": lambda: [
            torch.randn(main.shape, generator=generator),
            normal(batch, 3, *(8 * side for side in main.shape[2:])),
        ],
        "proj_embedding": lambda: [normal(batch, int(arguments.get("embedding_dim", 32)))],
        "token_lengths": lambda: [torch.full((batch,), length)],
        "mel_specgram": lambda: [normal(batch, int(arguments.get("n_mels", 80)), 12)],
        "mel_specgram_lengths": lambda: [torch.full((batch,), 12)],
        "encoder_attention_mask": lambda: [torch.ones(batch, 7)],
        "pooled_projections": lambda: [normal(batch, int(arguments.get("pooled_projection_dim", 32)))],
        "class_labels": lambda: [torch.zeros(batch, dtype=torch.int64)],
    }
    rule = rules.get(name)
    return rule() if rule else []
