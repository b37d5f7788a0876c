"""Finds inputs for a network from its forward's signature and its configuration, by trying."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["arguments_named", "first_that_runs", "inputs_for_config"]

_GROUPS: tuple[tuple[str, ...], ...] = (
    (),
    ("pixel_values",),
    ("input_ids",),
    ("input_ids", "pixel_values"),
    ("decoder_input_ids",),
    ("decoder_input_ids", "input_ids"),
    ("input_features",),
    ("input_ids", "input_features"),
    ("input_features", "input_features_mask"),
    ("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ("input_values",),
    ("input_ids", "attention_mask", "bbox"),
    ("input_ids", "attention_mask", "pixel_values", "bbox"),
    ("pixel_values", "decoder_input_ids"),
    ("pixel_values", "pixel_mask", "input_ids", "attention_mask"),
)


def inputs_for_config(
    model: nn.Module, config: Any, batch: int = 2, length: int = 9, limit: int = 60
) -> dict[str, torch.Tensor] | None:
    """Arguments of forward by name, on which the network runs; None where nothing of so many does."""
    candidates = _candidates(model, config, batch, length)
    found: dict[str, torch.Tensor] | None = first_that_runs(model, candidates, limit)
    return found


def first_that_runs(model: nn.Module, candidates: Any, limit: int = 60) -> Any:
    """The first inputs on which the network computes a floating-point tensor, of so many; its state stays."""
    for inputs in itertools.islice(candidates, limit):
        if _runs(model, inputs):
            return inputs
    return None


def _runs(model: nn.Module, inputs: Any) -> bool:
    flags = {module: module.training for module in model.modules()}
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    try:
        with _quietly(), torch.no_grad():
            output = model.eval()(*args, **kwargs)
            copy.deepcopy(model).train()(*args, **kwargs)
        return any(
            isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel() for v in _leaves(output)
        )
    except MemoryError:
        raise
    except Exception:
        return False
    finally:
        for module, training in flags.items():
            module.training = training


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    state = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _leaves(getattr(value, name))
    else:
        yield value


def _candidates(model: Any, config: Any, batch: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Required arguments and the main one; then with one of the groups after another."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(model, "main_input_name", None)
    mains = [main] if isinstance(main, str) and main in parameters else []
    seen = set()
    for group in _GROUPS:
        if not all(name in parameters for name in group):
            continue
        for base in (required + mains, required):
            names = tuple(dict.fromkeys([*base, *group]))
            if not names or frozenset(names) in seen:
                continue
            seen.add(frozenset(names))
            choices = [arguments_named(name, config, batch, length) for name in names]
            if all(choices):
                for values in itertools.islice(itertools.product(*choices), 8):
                    yield dict(zip(names, values, strict=True))
    with contextlib.suppress(Exception):
        own = dict(model.dummy_inputs)
        if all(name in parameters for name in own):
            yield own


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_diff_dict"):
            yield from _configs(value)


def _looked_up(config: Any, *names: str, default: Any = None) -> Any:
    for name in names:
        for part in _configs(config):
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, bool):
                return value
    return default


def arguments_named(name: str, config: Any, batch: int, length: int) -> list[torch.Tensor]:
    """What an argument of that name may be, most likely first; nothing where the name says nothing."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=generator)

    make: dict[str, Callable[[], Sequence[torch.Tensor]]] = {
        "input_ids": lambda: _tokens(config, batch, length, integers),
        "decoder_input_ids": lambda: _tokens(config, batch, length - 2, integers),
        "attention_mask": lambda: [torch.ones(batch, length, dtype=torch.int64)],
        "token_type_ids": lambda: [torch.zeros(batch, length, dtype=torch.int64)],
        "pixel_values": lambda: _images(config, batch, normal),
        "pixel_values_videos": lambda: _videos(config, batch, normal),
        "pixel_mask": lambda: [torch.ones(batch, *_image_size(config), dtype=torch.int64)],
        "input_values": lambda: _sounds(config, batch, normal),
        "input_features": lambda: _spectra(config, batch, normal),
        "bbox": lambda: [torch.tensor([1, 1, 5, 5]).expand(batch, length, 4).contiguous()],
        "input_points": lambda: [torch.full((batch, 1, 1, 2), 3.0)],
        "past_values": lambda: _series(config, batch, normal),
        "past_time_features": lambda: [
            normal(batch, _past(config), _looked_up(config, "num_time_features", default=1) or 1)
        ],
        "past_observed_mask": lambda: [torch.ones(batch, _past(config))],
        "future_values": lambda: [normal(batch, _looked_up(config, "prediction_length", default=4))],
        "future_time_features": lambda: [
            normal(
                batch,
                _looked_up(config, "prediction_length", default=4),
                _looked_up(config, "num_time_features", default=1) or 1,
            )
        ],
        "states": lambda: [normal(batch, length, _looked_up(config, "state_dim", default=17))],
        "actions": lambda: [normal(batch, length, _looked_up(config, "act_dim", default=4))],
        "rewards": lambda: [normal(batch, length, 1)],
        "returns_to_go": lambda: [normal(batch, length, 1)],
        "timesteps": lambda: [torch.arange(length).expand(batch, length).contiguous()],
        "spectrogram": lambda: [
            normal(batch, 20, _looked_up(config, "model_in_dim", "num_mel_bins", default=80))
        ],
        "audio_codes": lambda: [
            integers(16, batch, _looked_up(config, "num_codebooks", "num_quantizers", default=4), length)
        ],
        "inputs": lambda: _perceived(config, batch, length, normal, integers),
        "visual_feats": lambda: [normal(batch, 5, _looked_up(config, "visual_feat_dim", default=2048))],
        "visual_pos": lambda: [torch.rand(batch, 5, 4, generator=generator)],
        "noise_spectrogram": lambda: [
            normal(batch, 20, _looked_up(config, "num_mel_channels", "num_mel_bins", default=80))
        ],
        "encoder_hidden_states": lambda: [
            normal(
                batch,
                length,
                _looked_up(config, "cross_attention_hidden_size", "hidden_size", "d_model", default=32),
            )
        ],
        "hidden_states": lambda: [
            *_patches(config, batch, normal),
            normal(batch, length, _looked_up(config, "hidden_size", "d_model", default=32)),
        ],
        "query_embeds": lambda: [normal(batch, length, _looked_up(config, "hidden_size", default=32))],
        "input_features_mask": lambda: [
            torch.ones(batch, spectrum.shape[-1], dtype=torch.int64)
            for spectrum in _spectra(config, batch, normal)
        ],
        "inputs_embeds": lambda: [
            normal(batch, length, _looked_up(config, "hidden_size", "d_model", default=32))
        ],
        "task_inputs": lambda: [
            torch.randint(0, 50, (batch, _looked_up(config, "task_seq_len", default=77)), generator=generator)
        ],
        "grid_thw": lambda: [torch.tensor([[1, 4, 4]] * batch)],
        "image_grid_thw": lambda: [torch.tensor([[1, 4, 4]] * batch)],
        "lang_ids": lambda: [torch.zeros(batch, dtype=torch.int64)],
    }
    rule = make.get(name)
    try:
        return list(rule()) if rule else []
    except Exception:  # a configuration in which these words mean something else
        return []


def _tokens(config: Any, batch: int, length: int, integers: Any) -> list[torch.Tensor]:
    vocabulary = _looked_up(config, "vocab_size", "n_vocab", default=64)
    vocabulary = vocabulary if type(vocabulary) is int else 64
    high = min(vocabulary, 120)
    ids = integers(high, batch, length, low=min(5, high // 2))
    end = _looked_up(config, "eos_token_id")
    end = end[0] if isinstance(end, (list, tuple)) and end else end
    result = [ids]
    if type(end) is int and 0 <= end < vocabulary:
        with_end = torch.where(ids == end, ids.new_tensor(high - 1), ids)
        with_end[:, -1] = end
        result.insert(0, with_end)
    books = _looked_up(config, "num_codebooks", "n_codes_total")
    if type(books) is int:
        result += [
            integers(high, batch, length, books, low=5),
            integers(high, batch, books, length, low=5),
            integers(high, batch * books, length, low=5),
        ]
    return result


def _image_size(config: Any) -> tuple[int, int]:
    size = _looked_up(config, "image_size", "img_size", "input_size", default=64)
    if isinstance(size, Mapping):
        size = [size.get("height", 64), size.get("width", 64)]
    if isinstance(size, int):
        return size, size
    return int(size[-2]), int(size[-1])


def _images(config: Any, batch: int, normal: Any) -> list[torch.Tensor]:
    channels = _looked_up(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if type(channels) is int and channels <= 16 else 3
    height, width = _image_size(config)
    frames = _looked_up(config, "num_frames", "frames_per_clip")
    flat = [normal(batch, channels, height, width)]
    if channels != 3:
        flat.append(normal(batch, 3, height, width))
    several = [normal(batch, 1, channels, height, width), normal(batch, 2, channels, height, width)]
    videos = [normal(batch, frames, channels, height, width)] if type(frames) is int else []
    larger = [normal(batch, channels, side, side) for side in (128, 224)]
    return [*videos, *flat, *several[:1], *_patches(config, batch, normal), *larger, *several[1:]]


def _patches(config: Any, batch: int, normal: Any) -> list[torch.Tensor]:
    """Sixteen patches of each image, one a row, as networks take them that take images of any size."""
    patch, frames = _looked_up(config, "patch_size"), _looked_up(config, "temporal_patch_size", default=1)
    channels = _looked_up(config, "in_channels", "in_chans", "num_channels", default=3)
    if not all(type(value) is int for value in (patch, frames, channels)):
        return []
    return [normal(16 * batch, channels * frames * patch**2)]


def _videos(config: Any, batch: int, normal: Any) -> list[torch.Tensor]:
    height, width = _image_size(config)
    frames = _looked_up(config, "num_frames", "frames_per_clip", default=4)
    return [normal(batch, frames, 3, height, width)]


def _sounds(config: Any, batch: int, normal: Any) -> list[torch.Tensor]:
    bins, frames = _looked_up(config, "num_mel_bins"), _looked_up(config, "max_length")
    spectra = [normal(batch, frames, bins)] if type(bins) is int and type(frames) is int else []
    return [*spectra, normal(batch, 4000), normal(batch, 1, 4000), normal(batch, 16000)]


def _spectra(config: Any, batch: int, normal: Any) -> list[torch.Tensor]:
    bins = _looked_up(
        config, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "mel_bins", default=80
    )
    wide = _looked_up(config, "feature_projection_input_dim")
    positions = _looked_up(config, "max_source_positions", default=50)
    found = [normal(batch, 20, wide)] if type(wide) is int else []
    found += [normal(batch, bins, 2 * positions), normal(batch, 40, bins), normal(batch, bins, 100)]
    frames, size = (
        _looked_up(config, "spec_size", default=256),
        _looked_up(config, "num_mel_bins", default=64),
    )
    return [
        *found,
        normal(batch, 1, 4 * frames, size),
        normal(batch, bins, 3000),
        normal(batch, 1, bins, 100),
    ]


def _past(config: Any) -> int:
    length = _looked_up(config, "context_length", default=16)
    lags = _looked_up(config, "lags_sequence", default=[])
    return int(length) + (max(lags) if lags else 0)


def _series(config: Any, batch: int, normal: Any) -> list[torch.Tensor]:
    channels = _looked_up(config, "num_input_channels", "input_size", default=1)
    length = _looked_up(config, "context_length", default=16)
    return [normal(batch, _past(config)), normal(batch, length, channels), normal(batch, 64)]


def _perceived(config: Any, batch: int, length: int, normal: Any, integers: Any) -> list[torch.Tensor]:
    width = _looked_up(config, "d_model", default=32)
    return [normal(batch, length, width), integers(60, batch, length), normal(batch, 3, 64, 64)]
