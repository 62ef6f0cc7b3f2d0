#!/usr/bin/env python
"""The command `regionspot evaluate-predictions`: metrics of a file of COCO or LVIS results."""

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["evaluate-predictions"].run()
