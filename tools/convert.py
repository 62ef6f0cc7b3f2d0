#!/usr/bin/env python
"""The command `regionspot convert`: proposal files between formats, the authors' tokens into a token store."""

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["convert"].run()
