#!/usr/bin/env python
"""The command `regionspot extract`: SAM's tokens of all annotated boxes into token stores."""

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["extract"].run()
