#!/usr/bin/env python
"""The command `regionspot check`: what of a data set cannot be used."""

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["check"].run()
