"""What all commands share: arguments are answered at once, slow imports come after."""

import importlib
import signal
import sys
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Command:
    """A command: its arguments, and where its work is done.

    Attributes:
        parse: adds the arguments to a parser, and returns those of a command line.
        module: has ``main(args)``, which does the work.
        help: description and examples; the first line is in the list of commands.
        kept: what an interruption leaves; ``parse`` may set another ``kept`` and ``resume_options``, the options that
            the command needs to resume.
        start: the function of ``module`` that a process runs: ``main``, or one that starts processes.
    """

    parse: Callable[[ArgumentParser, Sequence[str]], Namespace]
    module: str
    help: str
    kept: str = ""
    start: str = "main"

    def parse_arguments(self, arguments: Sequence[str], program: str | None = None) -> Namespace:
        """Return the parsed arguments; ``--help`` and wrong ones end the process."""
        parser = ArgumentParser(program, description=self.help, formatter_class=RawDescriptionHelpFormatter)
        parser.set_defaults(kept=self.kept, resume_options=())
        return self.parse(parser, arguments)

    def call(self, *arguments: object) -> Any:
        """Do the work from Python, and return its result; errors are raised."""
        args = self.parse_arguments([str(argument) for argument in arguments])
        return importlib.import_module(self.module).main(args)

    def run(self, arguments: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
        """Do the work and exit; errors and interruptions end as one line, see ``run_command``."""
        args = self.parse_arguments(sys.argv[1:] if arguments is None else arguments, program)
        # Ctrl-C ends the slow imports without a traceback; run_command restores Python's handler.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        start = getattr(importlib.import_module(self.module), self.start)
        from regionspot.utils.command_line import run_command  # as slow to import as the module

        run_command(start, args, kept=args.kept, options=args.resume_options)


def add_overrides(parser: ArgumentParser) -> None:
    """Add the ``KEY VALUE`` pairs at the end of a command line, which override the config."""
    parser.add_argument("opts", nargs=REMAINDER, metavar="KEY VALUE", help="config overrides")


def join_negative(arguments: Sequence[str]) -> list[str]:
    """Replace "--boxes -3,5,30,20", in which argparse sees two options, by "--boxes=-3,5,30,20"."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--boxes", "--points"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def run_one_of(commands: Mapping[str, Command], program: str, description: str) -> NoReturn:
    """Run the command that the process's first argument names."""
    width = max(map(len, commands))
    listing = "\n".join(f"  {name:{width}}  {command.help.splitlines()[0]}" for name, command in commands.items())
    parser = ArgumentParser(
        program,
        description=description,
        epilog=f"commands:\n{listing}\n\n`{program} COMMAND --help` lists a command's arguments.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of the following")
    if len(sys.argv) == 1:
        parser.print_help(sys.stderr)
        sys.exit(2)
    name = parser.parse_args(sys.argv[1:2]).command
    commands[name].run(sys.argv[2:], f"{program} {name}")
