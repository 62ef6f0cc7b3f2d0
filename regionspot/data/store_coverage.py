"""Whether a token store has what training asks for: checked before training starts."""

from typing import Any

from detectron2.data import transforms as T

from regionspot.data.proposals import ProposalFile
from regionspot.data.tokens import TokenStore
from regionspot.data.tokens.manifest import describe, is_same


def check_coverage(
    store: TokenStore,
    augmentations: list[T.Augmentation],
    box_jitter: float,
    proposals: ProposalFile | None,
    match_iou: float,
) -> None:
    """Refuse, by a ``ValueError``, what a store has no tokens for; the arguments are ``RegionSpotDatasetMapper``'s."""
    _check_augmentations(augmentations, store)
    command = _extract_command(store, box_jitter, proposals, match_iou)
    _check_jitter(box_jitter, store, command)
    _check_proposals(proposals, match_iou, store, command)


def check_match_iou(match_iou: float) -> float:
    """Return the IoU from which on proposals match an annotated box; a ``ValueError`` refuses what is no IoU."""
    if not 0 < match_iou <= 1:
        raise ValueError(
            f"MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN: expected an IoU above 0, at most 1, got {match_iou}"
        )
    return match_iou


def describe_proposals(proposals: ProposalFile | None, match_iou: float) -> dict[str, Any] | None:
    """Return what a manifest has of the proposals that are regions to learn from, None for annotated boxes alone."""
    if proposals is None:
        return None
    return {"source": proposals.path.name, "fingerprint": proposals.sha256, "iou": match_iou}


def _check_augmentations(augmentations: list[T.Augmentation], store: TokenStore) -> None:
    covered = "no augmentation"
    if store.manifest["flip"]:
        covered = "the horizontal flip only"
        augmentations = [a for a in augmentations if not (isinstance(a, T.RandomFlip) and a.horizontal)]
    if augmentations:
        names = ", ".join(type(augmentation).__name__ for augmentation in augmentations)
        raise ValueError(
            f"token store {store.directory} covers {covered}, but the config asks for {names}: "
            "set INPUT.MIN_SIZE_TRAIN (0,), INPUT.RANDOM_FLIP none (or horizontal, with a store made with --flip) and "
            "INPUT.CROP.ENABLED False, or train without stored tokens"
        )


def _extract_command(store: TokenStore, box_jitter: float, proposals: ProposalFile | None, match_iou: float) -> str:
    """Return the command whose store has all that is asked for, but for its config, data set and directory."""
    options = ["--flip"] if store.manifest["flip"] else []
    if box_jitter:
        options += ["--jitter", str(box_jitter), "--jitter-copies", str(store.num_copies or 3)]
    if proposals:
        options += ["--proposals", str(proposals.path)]
    iou = ["MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN", str(match_iou)] if proposals and match_iou != 0.5 else []
    return " ".join(["regionspot extract", *options, "--output DIR", *iou])


def _check_jitter(strength: float, store: TokenStore, command: str) -> None:
    stored = store.jitter
    if strength and strength != stored:
        has = f"jittered copies of strength {stored}" if stored else "no jittered copies"
        remedy = f"{stored} or 0.0" if stored else "0.0"
        raise ValueError(
            f"token store {store.directory}: expected jittered copies of INPUT.BOX_JITTER {strength}, got {has}; "
            f"set INPUT.BOX_JITTER to {remedy}, or extract into another directory with `{command}`"
        )


def _check_proposals(proposals: ProposalFile | None, match_iou: float, store: TokenStore, command: str) -> None:
    expected, stored = describe_proposals(proposals, match_iou), store.manifest.get("proposals")
    if is_same(stored, expected):
        return
    needed, has = (f"those of {describe(x)}, too" if x else "annotated ones alone" for x in (expected, stored))
    raise ValueError(
        f"token store {store.directory} has tokens of other boxes than DATASETS.PROPOSAL_FILES_TRAIN and "
        f"MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN ask for: expected {needed}, got {has}; change these keys, or "
        f"extract into another directory with `{command}`"
    )
