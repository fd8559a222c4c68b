"""An LRU cache of encoded images, limited by their memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from localization_heads.data.sources import PromptImages, images_of
from localization_heads.lvlm.sharing import EncodedImage


class ImageCache:
    """Encoded images by content and prompt settings; the least recently used is evicted first. Thread-safe.

    Args:
        max_bytes: keys, values and pixels of all images together. An image that is larger by itself is encoded and
            answered, but not kept; 0 keeps none.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._images: OrderedDict[tuple[object, ...], EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return self._sum()

    def get(self, key: tuple[object, ...], encode: Callable[[], EncodedImage]) -> EncodedImage:
        """The cached image, or a new one from `encode`."""
        with self._lock:
            if (cached := self._images.get(key)) is not None:
                self._images.move_to_end(key)
                return cached
        image = encode()  # outside the lock, so that other images need not wait
        with self._lock:
            return self._images.setdefault(key, image)

    def evict(self) -> None:
        """Drop images until the rest fits. Called after each use, as asking for deeper layers makes an image grow."""
        with self._lock:
            while self._images and self._sum() > self.max_bytes:
                self._images.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._images.clear()

    def _sum(self) -> int:
        return sum(image.num_bytes for image in self._images.values())


def pixel_digest(shown: PromptImages) -> bytes:
    """A SHA-256 digest of the pixels of all images."""
    digest = hashlib.sha256()
    for image in images_of(shown):
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.digest()
