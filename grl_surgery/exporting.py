"""export and load: a network to a file and back, the format chosen by the name's ending."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from grl_surgery import safetensors_file as checkpoints
from grl_surgery.atomic_files import write_file
from grl_surgery.errors import ExportError
from grl_surgery.splicing import check_model

__all__ = ["export", "load"]

Purpose = Literal["training", "inference"]
_FORMATS = ".safetensors, .pt2, .onnx, or a folder, whose name has no ending"
