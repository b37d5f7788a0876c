"""The command line. No torch at the top, here and in the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from grl_surgery.cli.attach import attach
from grl_surgery.cli.console import (
    FAILED,
    NAME,
    REFUSED,
    complain,
    open_streams,
    silence,
    stdout,
    working,
)
from grl_surgery.cli.doctor import doctor
from grl_surgery.cli.export import export
from grl_surgery.cli.graph import print_graph
from grl_surgery.cli.insert import insert
from grl_surgery.cli.new import new
from grl_surgery.cli.probe import probe
from grl_surgery.cli.strip import strip
from grl_surgery.cli.verify import verify
from grl_surgery.cli.zoo import zoo
from grl_surgery.errors import FlipError, SurgeryError

__all__ = ["app", "main"]


class _Command(typer.core.TyperCommand):
    """A command whose help shows a flag without the type of its value, which nobody writes."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class _Group(typer.core.TyperGroup):
    """The same for the options of the program itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


app = typer.Typer(
    cls=_Group,
    help="Splice gradient reversals into an existing network; prove that exactly the right gradients flip.",
    epilog="MODEL is timm/NAME, torchvision/NAME, transformers/NAME, package.module:factory or "
    "file.py:factory. "
    "Exit status: 0 done, 1 a check failed, 2 the request cannot be met.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; what the user can mend is one message on stderr, never a traceback.

    Whatever ends it, the status 1 means that a check failed.

    Args:
        argv: The arguments; by default those of the process.
    """
    open_streams()
    try:
        typer.main.get_command(app)(args=argv, prog_name=NAME)
    except SurgeryError as error:
        complain(str(error))
        sys.exit(FAILED if isinstance(error, FlipError) else REFUSED)
    except OSError as error:
        complain(
            f"{error.filename or 'standard output'} cannot be written or read: {error.strerror or error}"
        )
        silence()
        sys.exit(REFUSED)
    except Exception:
        traceback.print_exc()
        sys.exit(REFUSED)
    sys.exit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata  # a tenth of the time that --help takes

        stdout().out(NAME, metadata.version(NAME), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


app.command("graph", cls=_Command)(print_graph)
app.command(cls=_Command)(insert)
app.command(cls=_Command)(attach)
app.command(cls=_Command)(verify)
app.command(cls=_Command)(export)
app.command(cls=_Command)(strip)
app.command(cls=_Command)(doctor)
app.command(cls=_Command)(zoo)
app.command(cls=_Command)(probe)
app.command(cls=_Command)(new)


@app.command(cls=_Command)
def demo() -> None:
    """The main job on a pretrained network and real photographs: splice, prove, strip."""
    with working("Importing"):
        from grl_surgery.cli.demo import run_demo
    raise typer.Exit(0 if run_demo(stdout()) else FAILED)
