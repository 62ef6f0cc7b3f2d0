#!/usr/bin/env python
"""The command `regionspot predict`: recognize regions of images."""

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["predict"].run()
