"""Token stores: frozen features of annotated regions on disk, so that training need not run SAM.

A store is a directory of safetensors shards and a manifest that says what is in them and what made it.
"""

from regionspot.data.tokens.store import TokenStore, find_damage, get_token_stages
from regionspot.data.tokens.writer import StoreWriter, pack_images

__all__ = ["StoreWriter", "TokenStore", "find_damage", "get_token_stages", "pack_images"]
