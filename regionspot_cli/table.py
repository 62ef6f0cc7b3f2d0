"""Runs the rows of one of the paper's tables."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from regionspot.checkpoint.fetch import find_known_weights
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.training_set import describe_annotations
from regionspot.model_zoo import CONFIGS

TABLES = CONFIGS.resolve() / "tables"
METRICS = ("APr", "APc", "APf", "AP")


def missing_inputs(cfg: CfgNode) -> list[str]:
    """Return the inputs of a config that are absent; known weights of SAM and CLIP are fetched when needed."""
    node = cfg.MODEL.REGIONSPOT
    files = [*cfg.DATASETS.PROPOSAL_FILES_TEST, cfg.MODEL.WEIGHTS]
    files += [source for source in (node.SAM.WEIGHTS, node.CLIP.WEIGHTS) if not find_known_weights(source)]
    missing = [path for path in files if path and "://" not in path and not Path(path).is_file()]
    for name in cfg.DATASETS.TEST:
        try:
            check_registered([name], "DATASETS.TEST")
        except (KeyError, FileNotFoundError) as error:
            missing.append(str(error.args[0]))
            continue
        directory = Path(MetadataCatalog.get(name).image_root)
        if not directory.is_dir():
            missing.append(f"images {directory}")
    return missing


def run_row(config: Path, output: Path, overrides: list[str], arguments: list[str]) -> dict[str, Any]:
    """Evaluate a config, unless it was evaluated before; return its metrics by test set."""
    # The config, the annotations, and the size and time of other inputs: a change of any makes the row run again.
    results, identity = output / "results.json", output / "row.identity"
    cfg = load_config(config, overrides)
    files = [Path(path) for path in (cfg.MODEL.WEIGHTS, *cfg.DATASETS.PROPOSAL_FILES_TEST) if Path(path).is_file()]
    expected = cfg.dump() + "".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in files)
    expected += "".join(f"{name} {describe_annotations(name)['fingerprint']}\n" for name in cfg.DATASETS.TEST)
    if not (results.is_file() and identity.is_file() and identity.read_text() == expected):
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "regionspot_cli", "evaluate", "--config-file", str(config)]
        if subprocess.run([*command, *arguments, *overrides, "OUTPUT_DIR", str(output)], check=False).returncode:
            raise ValueError(f"{config}: the evaluation failed, see above; previous rows are kept")
        identity.write_text(expected)
    for path in sorted(output.glob("inference/*/metrics.json")):
        print(json.loads(path.read_text())["protocol"])
    return json.loads(results.read_text())


def average(results: dict[str, Any], task: str, key: str) -> float | None:
    """Return a metric, averaged over the test sets where there are several."""
    values = [sets[task][key] for sets in results.values() if sets.get(task, {}).get(key) is not None]
    return sum(values) / len(values) if values else None


def main(args: Namespace) -> None:
    table = json.loads((TABLES / f"{args.table}.json").read_text())
    lines = []
    for row in table["rows"]:
        config = TABLES / f"{row['config']}.yaml"
        missing = missing_inputs(load_config(config, args.opts))
        measured = [""] * len(METRICS)
        if missing:
            print(f"{row['what']}: not run, missing: {'; '.join(missing)}")
        else:
            output = args.output / row["config"]
            results = run_row(config, output, args.opts, ["--num-gpus", args.num_gpus, "--dist-url", "auto"])
            averages = [average(results, row["task"], key) for key in METRICS]
            measured = ["" if value is None else f"{value:.1f}" for value in averages]
        published = [str(row["paper"].get(key, "")) for key in METRICS]
        lines.append([row["what"], *(f"{cell or '-'} / {paper or '-'}" for cell, paper in zip(measured, published))])
    print(f"\n{table['note']}\n")
    print(tabulate(lines, headers=["ours / the paper's", *METRICS], disable_numparse=True))
