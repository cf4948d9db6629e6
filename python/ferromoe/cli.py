"""The command `ferromoe`: results to stdout, progress to stderr.

Exit status 2 for bad arguments, 1 for a job that failed, 130 after Ctrl-C. The commands
stand in `commands/`.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules

from . import commands

EXTRAS = {
    "typer": "cli",
    "rich": "cli",
    "torch": "torch",
    "safetensors": "torch",
    "transformers": "transformers",
    "matplotlib": "demo",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    try:
        status = run(arguments)
    except KeyboardInterrupt:
        status = say("interrupted", 130)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        status = say(
            f"{error.name} must be installed for this command, got nothing of that name: "
            f"pip install 'ferromoe[{extra}]'",
            1,
        )
    except (ValueError, TypeError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        # What the user named is wrong.
        status = say(str(error), 2)
    except (OSError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        status = say(str(error), 1)
    sys.exit(status)


def run(arguments: list[str] | None) -> int:
    """Parse and run; errors come out as exceptions."""
    import typer

    app = typer.Typer(
        name="ferromoe",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Faster and smaller Mixture-of-Experts models.",
        rich_markup_mode="rich",
    )

    @app.callback()
    def root() -> None:
        # With a callback even a single command keeps its name.
        pass

    for group in iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{group.name}").register(app)
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="ferromoe", standalone_mode=False)
    except Exception as error:
        # Typer's own errors (an unknown option, a missing argument) know how to show themselves.
        sentence, status = getattr(error, "format_message", None), getattr(error, "exit_code", 2)
        if sentence is not None:
            return say(sentence(), int(status))
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from None
        raise
    if result == 130:  # typer has caught Ctrl-C itself
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def say(message: str, status: int) -> int:
    """Print one sentence to stderr and hand the status on."""
    from contextlib import suppress

    with suppress(BrokenPipeError):
        print(f"ferromoe: {message}", file=sys.stderr)
    return status
