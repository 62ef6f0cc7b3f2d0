"""``regionspot COMMAND``, or ``python -m regionspot_cli COMMAND``."""

from typing import NoReturn

from regionspot_cli.command import run_one_of
from regionspot_cli.commands import COMMANDS


def main() -> NoReturn:
    run_one_of(COMMANDS, "regionspot", "Open-world region recognition for Detectron2.")


if __name__ == "__main__":
    main()
