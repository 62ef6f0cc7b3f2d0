"""Every configuration key that RegionSpot adds to Detectron2's, and how configs are loaded."""

from regionspot.config.defaults import add_regionspot_config
from regionspot.config.loading import HOST_CONFIG, find_host_config, load_config

__all__ = ["HOST_CONFIG", "add_regionspot_config", "find_host_config", "load_config"]
