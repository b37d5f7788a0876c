"""Every format of one adapted network, written, read back, and compared on a photograph.

python examples/export.py
python examples/export.py --folder exported
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch
from torch import nn

import grl_surgery as gs
from grl_surgery.cli.demo import load_packaged_efficientnet_lite0, photographs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", help="where to leave the files; a temporary folder by default")
    parser.add_argument("--network", help="a network of timm with random weights, for a quick look")
    args = parser.parse_args(arguments)
    network = timm.create_model(args.network) if args.network else load_packaged_efficientnet_lite0()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(exist_ok=True)
        write_and_compare(network.eval(), folder)


def write_and_compare(model: nn.Module, folder: Path) -> None:
    images = torch.stack(list(photographs(model).values()))
    expected = model(images).detach()
    m = gs.attach_domain_head(model, after="global_pool", hidden=64)
    gs.verify_flip(m, reference=model).raise_if_failed()

    checkpoint = folder / "network.safetensors"
    gs.export(m, checkpoint)
    again = gs.load(checkpoint, model=model).eval()
    say(checkpoint, again(images)[0], expected)

    gs.export(m, folder / "training.pt2", example_inputs=images)
    say(folder / "training.pt2", gs.load(folder / "training.pt2")(images)[0], expected)

    gs.export(m, folder / "inference.pt2", example_inputs=images, purpose="inference")
    say(folder / "inference.pt2", torch.export.load(folder / "inference.pt2").module()(images), expected)

    gs.export(m, folder / "inference.onnx", example_inputs=images)
    session = onnxruntime.InferenceSession(str(folder / "inference.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    say(folder / "inference.onnx", torch.from_numpy(found), expected)


def say(path: Path, found: torch.Tensor, expected: torch.Tensor) -> None:
    """One line: the size of the file, and how far its outputs are from the network's."""
    equal = (
        "equal, bit for bit"
        if torch.equal(found, expected)
        else f"within {(found - expected).abs().max():.0e}"
    )
    print(f"{path.name:<20} {path.stat().st_size:>12,} bytes   outputs {equal}")


if __name__ == "__main__":
    main()
