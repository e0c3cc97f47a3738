"""Memory for what a reader makes on the spot, up to a bound."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping

KEPT_BYTES = 512 * 2**20


class KeptParts:
    """Keeps the parts of the first pictures that were made, compressed, up to `KEPT_BYTES`.

    An extraction goes through all pictures several times, always in the same order: if the oldest
    made room for the newest, none would be there when its turn came again.
    """

    def __init__(self) -> None:
        self._pictures: dict[str, dict[str, bytes]] = {}
        self._free_bytes = KEPT_BYTES
        self._lock = threading.Lock()

    def find(self, path: str, part: str) -> bytes | None:
        """Give one part of a picture, or None where it is not kept."""
        with self._lock:
            known = self._pictures.get(path)
        return None if known is None else zlib.decompress(known[part])

    def keep(self, path: str, parts: Mapping[str, bytes]) -> None:
        """Keep a picture's parts, if there is room."""
        packed = {part: zlib.compress(data, 1) for part, data in parts.items()}
        n_bytes = sum(len(data) for data in packed.values())
        with self._lock:
            if path not in self._pictures and n_bytes <= self._free_bytes:
                self._pictures[path] = packed
                self._free_bytes -= n_bytes
