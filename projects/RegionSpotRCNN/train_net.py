#!/usr/bin/env python
"""Train or evaluate a detector whose head is RegionSpot's.

Examples:
    projects/RegionSpotRCNN/train_net.py --config-file projects/RegionSpotRCNN/configs/faster_rcnn_R_50_FPN.yaml \
        --eval-only MODEL.REGIONSPOT.HEAD.WEIGHTS regionspot_bb.pth
    projects/RegionSpotRCNN/train_net.py --config-file projects/RegionSpotRCNN/configs/faster_rcnn_R_50_FPN.yaml \
        --num-gpus 8 MODEL.REGIONSPOT.HEAD.WEIGHTS regionspot_bb.pth
"""

from regionspot_cli.command import Command
from regionspot_cli.commands import parse_project

COMMAND = Command(parse_project, "rcnn_training", __doc__, start="start")  # the module beside this file

if __name__ == "__main__":
    COMMAND.run()
