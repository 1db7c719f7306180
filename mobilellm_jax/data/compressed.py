"""Files that are read through: bytes counted before decompression, and zstd frames."""

import io
from collections.abc import Callable
from typing import Any

from mobilellm_jax.errors import of_extra

OnRead = Callable[[int], object]


class CountedFile(io.FileIO):
    """A file that reports the bytes read from disk, before decompression."""

    def __init__(self, path: str, on_read: OnRead) -> None:
        super().__init__(path)
        self._on_read = on_read

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._on_read(count)
        return count


class ZstdFile(io.RawIOBase):
    """Decompressed bytes of zstd frames; zstandard's own reader ends a truncated file without an error.

    Raises:
      UserError: zstandard is not installed.
      EOFError: when it is read: the file is truncated or not valid.
    """

    def __init__(self, file: io.BufferedIOBase, path: str) -> None:
        self._zstandard = of_extra("zstandard", "zstd", f"{path}: zstd")
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 16)
            if not self._compressed:
                if self._frame:
                    raise EOFError("the last frame is not complete")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
