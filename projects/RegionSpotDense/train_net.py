#!/usr/bin/env python
"""Train a detector whose boxes RegionSpot names, or evaluate it with --eval-only, from a lazy config.

Examples:
    train_net.py --config-file configs/retinanet_R_50_FPN.py --num-gpus 8 [--resume]
    train_net.py --config-file configs/retinanet_R_50_FPN.py --eval-only model.recognizer.weights=regionspot_bb.pth
    train_net.py --config-file configs/retinanet_R_50_FPN.py --num-gpus 2 train.device=cpu   (two processes)
    train_net.py --config-file configs/fcos_R_50_FPN.py dataloader.train.dataset.names=my.json:my_images
"""

from regionspot_cli.command import Command
from regionspot_cli.commands import parse_project

COMMAND = Command(parse_project, "dense_training", __doc__, start="start")  # the module beside this file

if __name__ == "__main__":
    COMMAND.run()
