"""Serves the local web page."""

import os
import tempfile
import threading
from argparse import Namespace
from importlib.util import find_spec

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger

from regionspot.config import load_config
from regionspot.utils.command_line import printable
from regionspot.vocabulary import load_vocabulary
from regionspot_cli.weights import leave_absent_weights


def main(args: Namespace) -> None:
    if find_spec("gradio") is None:
        raise ValueError("the app needs Gradio: pip install 'regionspot[app]'")
    setup_logger(name="regionspot")
    cfg = load_config(args.config_file, args.opts)
    source = args.vocabulary or cfg.MODEL.REGIONSPOT.VOCABULARY
    names = load_vocabulary(source) if source else []
    if args.cached_weights_only:
        leave_absent_weights(cfg)
    torch.manual_seed(max(cfg.SEED, 0))
    with tempfile.TemporaryDirectory(prefix="regionspot-") as directory:
        os.environ["GRADIO_TEMP_DIR"] = directory  # uploads are deleted with it
        serve(args, cfg, names)


def serve(args: Namespace, cfg: CfgNode, names: list[str]) -> None:
    """Load the model and serve the page until a signal ends it."""
    from regionspot.app.page import Page, launch
    from regionspot.app.recognition import PageModel

    page = Page(PageModel(cfg), names)
    if args.check:
        print("the page is complete")
        return
    address = launch(page, args.host, args.port, args.max_upload)
    print(f"the page is at {printable(address)}; Ctrl-C ends it", flush=True)
    if args.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"everyone who can reach this machine at {printable(args.host)} can use it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:  # also after SIGTERM: a server has no other end
        page.blocks.close()
