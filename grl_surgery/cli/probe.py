"""grl-surgery probe: suggests the point at which to attach a domain head."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from grl_surgery.cli.console import stdout, working
from grl_surgery.cli.model_args import load
from grl_surgery.cli.options import AsJson, Checkpoint, Model, Pretrained
from grl_surgery.errors import SurgeryError

__all__ = ["probe"]

_DATA = "--data mine.py:data, where 'def data(): return source_loader, target_loader'"


def probe(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="A function without arguments that returns the batches of the source and of the target.",
            show_default=False,
        ),
    ],
    points: Annotated[
        list[str] | None,
        typer.Option("--point", metavar="MODULE", help="Only this module; repeatable.", show_default=False),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Levels of modules to look into.", show_default=False),
    ] = None,
    max_samples: Annotated[
        int, typer.Option(metavar="N", min=8, help="Samples of each domain, at most.")
    ] = 2048,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw it as well.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Say at which point to attach a domain head: how far each tells the domains apart, and the classes."""
    loaded = load(model, pretrained, checkpoint)
    with working("Probing"):
        from grl_surgery.adaptation.probing import suggest_points

        source, target = _batches(data)
        found = suggest_points(
            loaded.module, source, target, points=points or None, depth=depth, max_samples=max_samples
        )
    if plot:
        found.plot(plot)
    stdout().out(json.dumps(found.to_dict(), indent=1) if as_json else str(found), highlight=False)


def _batches(data: str) -> tuple[Any, Any]:
    """What the user's function returns."""
    import importlib.util

    from grl_surgery.errors import one_line

    file, _, name = data.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not path.is_file():
        raise SurgeryError(f"--data {data!r} names no function in a Python file that exists", example=_DATA)
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            raise SurgeryError(f"{file} has no function {name!r}", example=_DATA)
        made = getattr(module, name)()
    except SurgeryError:
        raise
    except Exception as error:  # the user's code: anything can come out of it
        raise SurgeryError(f"{data} raised {one_line(error)}", example=_DATA) from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise SurgeryError(
            f"{data} returned a {type(made).__name__}, not the batches of two domains", example=_DATA
        )
    return made[0], made[1]
