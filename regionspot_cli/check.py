"""Reads the annotations and all images of a data set, and reports what cannot be used."""

from argparse import Namespace
from typing import Any

from tqdm import tqdm

from regionspot.data.dataset_check import check_dataset, is_usable
from regionspot.utils.command_line import printable
from regionspot.utils.files import write_json

LISTED = 20  # printed entries of each list; --json has all


def format_report(report: dict[str, Any]) -> str:
    """Return a report as text, with the beginning of long lists."""
    left_out = [f"{count:,} {reason}" for reason, count in report["left_out"].items()]
    left_out.append(f"{report['images_without_regions']:,} images without regions")
    statistics, classes = report["statistics"], report["regions_of_classes"]
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    most = ", ".join(f"{printable(name)} {count:,}" for name, count in ranked[:5])
    lines = [
        f"{report['dataset']}: " + ", ".join(f"{report[key]:,} {key}" for key in ("images", "regions", "classes")),
        f"left out: {', '.join(left_out)}",
        f"regions of an image (quartiles): {statistics['regions_of_image']}",
        f"side of a box in pixels (quartiles): {statistics['side_in_pixels']}; "
        + ", ".join(f"{statistics[size]:,} {size}" for size in ("small", "medium", "large")),
        f"classes without a region: {sum(count == 0 for count in classes.values()):,}; most regions: {most}",
    ]
    lines += _listing("class names that are empty", report["names"]["empty"])
    lines += _listing("class names too long for CLIP", report["names"]["too_long"])
    lines += _listing("class names that occur more than once", report["names"]["duplicates"])
    lines += _listing("images that cannot be used", [image["problem"] for image in report["unusable"]])
    return "\n".join(lines)


def _listing(title: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"  ... and {len(entries) - LISTED:,} more; --json FILE lists all"] if len(entries) > LISTED else []
    shown = [printable(entry) if entry.strip() else repr(entry) for entry in entries[:LISTED]]
    return [f"{title}: {len(entries):,}", *(f"  {entry}" for entry in shown), *more]


def main(args: Namespace) -> int:
    def progress(checks: Any, num_images: int) -> Any:
        return tqdm(checks, total=num_images, desc=f"images of {args.dataset}", unit="image")

    report = check_dataset(args.dataset, args.workers, progress)
    print(format_report(report))
    if args.json:
        write_json(args.json, report)
    print("all of it can be used" if is_usable(report) else "error: not all of it can be used")
    return 0 if is_usable(report) else 1
