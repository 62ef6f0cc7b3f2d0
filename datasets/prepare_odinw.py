#!/usr/bin/env python
"""ODinW's annotations without the background category, and a check of all sets."""

from regionspot_cli.prepare import PREPARE

if __name__ == "__main__":
    PREPARE["odinw"].run()
