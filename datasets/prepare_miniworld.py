#!/usr/bin/env python
"""The command `miniworld draw`: the miniature world's splits, drawn into $DETECTRON2_DATASETS/miniworld."""

from miniworld.__main__ import COMMANDS

if __name__ == "__main__":
    COMMANDS["draw"].run()
