"""YAML configs, read as Detectron2 reads them, and checked: nothing is fetched, and no code runs."""

import re
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from regionspot.utils.files import expand_user
from regionspot.utils.unpickling import check_size


def merge_yaml(cfg: CfgNode, path: str | Path) -> None:
    """Merge a YAML file, with its ``_BASE_``, into ``cfg`` as ``cfg.merge_from_file`` does; each file is read once.

    Raises:
        FileNotFoundError: no such file, or no such ``_BASE_``.
        ValueError: not YAML, not a mapping, keys that ``cfg`` lacks, values of another type, or another ``VERSION``.
    """
    content = _load_with_base(Path(path))
    try:
        for key, value in content.items():
            if isinstance(cfg.get(key), CfgNode) and not isinstance(value, dict):
                # CfgNode would replace the whole section by the value
                raise ValueError(f"{key}: expected keys below it, got {value!r:.80}")
        if content.get("VERSION", cfg.VERSION) != cfg.VERSION:  # its keys have other names
            raise ValueError(f"VERSION: expected {cfg.VERSION}, got {content['VERSION']!r:.80}")
        cfg.merge_from_other_cfg(CfgNode(content))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config {str(path)!r}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return a merge error in one line."""
    # yacs repeats the whole sections whose types differ; the types are enough.
    text = str(error.args[0] if error.args else error)
    mismatch = re.fullmatch(r"Type mismatch \((.+) vs\. (.+?)\) with values .* for config key: (.+)", text, re.DOTALL)
    return f"{mismatch[3]}: expected {mismatch[1]}, got {mismatch[2]}" if mismatch else text


def _load_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a config and merge it into its ``_BASE_``, which files ``above`` may have named it as.

    It refuses what is not a config: empty, a list, endless, or with a ``_BASE_`` that is missing or circular.
    """
    what = f"config {str(path)!r}"
    if not path.is_file():
        hint = f" (_BASE_ of {above[-1]})" if above else "; the shipped ones are in configs/"
        raise FileNotFoundError(f"{what}: no such file{hint}")
    if path.resolve() in above:
        raise ValueError(f"{what}: its _BASE_ leads back to it")
    content = _read_yaml(path, what)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        got = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{what}: expected KEY: value, got {got}")
    bases = content.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or "://" in base:  # Detectron2 would fetch it
            raise ValueError(f"{what}: _BASE_: expected a path, got {base!r:.80}; nothing is fetched, save a copy")
        _merge(_load_with_base(path.parent / expand_user(base), (*above, path.resolve())), merged, what)
    _merge(content, merged, what)
    return merged


def _merge(content: dict[str, Any], base: dict[str, Any], what: str) -> None:
    """Merge ``content`` into ``base``, section by section."""
    for key, value in content.items():
        if isinstance(value, dict) and key in base:
            if not isinstance(base[key], dict):
                raise ValueError(f"{what}: {key}: expected a value as in _BASE_, got keys below it")
            _merge(value, base[key], what)
        else:
            base[key] = value


def _read_yaml(path: Path, what: str) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_size(content, path.stat().st_size)  # a few anchors can stand for gigabytes
    except OSError:
        raise
    except Exception as error:  # the parser raises many types for damaged files
        raise ValueError(f"{what}: not readable as YAML ({' '.join(str(error).split())})") from error
    return content


def check_values(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> None:
    """Refuse what Detectron2 accepts: no value where the default has one, and sequences with items of another type.

    Raises:
        ValueError: names the key.
    """
    for key, value in cfg.items():
        default = defaults.get(key)
        if isinstance(value, CfgNode):
            check_values(value, default if isinstance(default, CfgNode) else CfgNode(), f"{prefix}{key}.")
        elif value is None and default is not None:
            raise ValueError(f"{prefix}{key}: expected {type(default)}, got nothing")
        elif isinstance(value, (list, tuple)) and (kind := _item_type(f"{prefix}{key}", default)):
            wrong = [item for item in value if not isinstance(item, kind)]
            if wrong:
                raise ValueError(
                    f"{prefix}{key}: expected {'names' if kind is str else 'numbers'}, got {wrong[0]!r:.80}"
                )


def _item_type(key: str, default: Any) -> Any:
    """Return the type of the default's items; None if it is empty or mixed."""
    # These defaults are empty.
    if key == "DATASETS.TRAIN_RATIO":
        return (int, float)
    if key.startswith("DATASETS."):
        return str
    candidates: list[Any] = [str, (int, float)]
    return next((kind for kind in candidates if default and all(isinstance(item, kind) for item in default)), None)
