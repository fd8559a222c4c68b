"""The pictures that were asked about last, kept encoded up to a number of bytes."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image

from localization_heads.lvlm.sharing import EncodedPicture

GIBIBYTE = 2**30


class RecentPictures:
    """Encoded pictures by content and settings, the one asked longest ago dropped first. Safe for several threads.

    Args:
        max_bytes: keys, values and pixels of all pictures together. A picture that is larger by itself is encoded and
            answered, but not kept; 0 keeps none.
    """

    def __init__(self, max_bytes: int = GIBIBYTE) -> None:
        self.max_bytes = max_bytes
        self._pictures: OrderedDict[tuple[object, ...], EncodedPicture] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return self._sum()

    def get(self, key: tuple[object, ...], encode: Callable[[], EncodedPicture]) -> EncodedPicture:
        """The picture of that key, encoded now if it is not there."""
        with self._lock:
            found = self._pictures.get(key)
            if found is not None:
                self._pictures.move_to_end(key)
                return found
        picture = encode()  # not under the lock: other pictures need not wait
        with self._lock:
            return self._pictures.setdefault(key, picture)

    def shrink(self) -> None:
        """Drop pictures until the rest fits. Called after the questions: a deeper one makes its picture grow."""
        with self._lock:
            while self._pictures and self._sum() > self.max_bytes:
                self._pictures.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._pictures.clear()

    def _sum(self) -> int:
        return sum(picture.num_bytes for picture in self._pictures.values())


def content(image: Image.Image) -> bytes:
    """32 bytes that stand for a picture's pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.digest()
