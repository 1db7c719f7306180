"""llama.cpp by the C functions of a prebuilt library: token ids, logits and greedy ids of a GGUF file.

The Python interface of xllamacpp gives no logits, but its library exports llama.cpp's C functions. Structures
are passed by value there, and their layout changes with the version. They are therefore taken as bytes: the
defaults are asked for, and the few fields to set are found by their values.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float32

from mobilellm_jax.errors import UserError

INSTALL = "python -m pip install -e '.[ondevice]'"

_ERROR = 4  # the level of log lines that say what failed
_F32, _F16 = 0, 1  # of ggml's types
_OFF, _AUTO = 0, 2**32 - 1
_KERNELS = "libggml-cpu-{}.so"
_DEFAULT_SIZES = (512, 2048, 512, 1)  # context, batch, micro-batch, sequences


class _Parameters(ctypes.Structure):
    """Room for llama_model_params or llama_context_params, which have 72 to 184 bytes today.

    Both are larger than 16 bytes, so functions that return one write it where they are told, and functions
    that take one read the part that they know: a larger structure does no harm.
    """

    _fields_ = (("bytes", ctypes.c_uint8 * 512),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result, then the arguments
    "llama_log_set": (None, _Log, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (_Parameters,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _Parameters),
    "llama_model_free": (None, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_bos": (c_int32, c_void_p),
    "llama_vocab_eos": (c_int32, c_void_p),
    "llama_vocab_get_add_bos": (c_bool, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_chat_template": (c_char_p, c_void_p, c_char_p),
    "llama_detokenize": (
        *(c_int32, c_void_p, POINTER(c_int32), c_int32),
        *(c_char_p, c_int32, c_bool, c_bool),
    ),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "llama_context_default_params": (_Parameters,),
    "llama_init_from_model": (c_void_p, c_void_p, _Parameters),
    "llama_free": (None, c_void_p),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_get_logits": (c_void_p, c_void_p),
    "ggml_backend_load": (c_void_p, c_char_p),
    "ggml_backend_load_all_from_path": (None, c_char_p),
}


def installed() -> bool:
    """Whether the extra with llama.cpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class Model:
    """A GGUF file in llama.cpp, on one CPU thread: with more, it spins, which a shared machine punishes."""

    def __init__(
        self, path: Path, context: int | None = None, exact: bool = True, library: Any = None
    ) -> None:
        """Loads a file.

        Args:
          path: the file.
          context: positions that fit in its key/value cache; None: as many as the file says.
          exact: keep keys and values in float32, and attend in float32. Otherwise, as llama.cpp does by
            itself, they are rounded to f16, which changes logits by about 1e-3 of the largest.
          library: what `load` returned; None: that of xllamacpp.

        Raises:
          UserError: llama.cpp is not installed, or refuses the file.
        """
        self._c = load() if library is None else library
        self._model = self._context = None
        _lines.clear()
        self._model = self._c.llama_model_load_from_file(
            str(path).encode(), self._c.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load it: {_said()}")
        self.context = self._c.llama_model_n_ctx_train(self._model) if context is None else context
        settings = _context_settings(self._c.llama_context_default_params(), self.context, exact)
        self._context = self._c.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError(f"{path}: llama.cpp makes no context of {self.context} positions: {_said()}")
        self._c.llama_set_n_threads(self._context, 1, 1)
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.vocab_size = self._c.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        if self._context:
            self._c.llama_free(self._context)
        if self._model:
            self._c.llama_model_free(self._model)
        self._model = self._context = None

    @property
    def marks(self) -> tuple[int | None, int | None]:
        """Ids of BOS and EOS; None where the file has none."""
        ids = self._c.llama_vocab_bos(self._vocab), self._c.llama_vocab_eos(self._vocab)
        bos_id, eos_id = (i if i >= 0 else None for i in ids)
        return bos_id, eos_id

    @property
    def adds_bos(self) -> bool:
        """Whether texts begin with BOS."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @property
    def template(self) -> str:
        """The chat template; "" where the file has none."""
        return (self._c.llama_model_chat_template(self._model, None) or b"").decode()

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text of ids; control tokens are skipped."""
        room = 16 + 8 * len(ids)
        while True:
            text, given = ctypes.create_string_buffer(room), (c_int32 * len(ids))(*ids)
            count = self._c.llama_detokenize(self._vocab, given, len(ids), text, room, True, False)
            if count >= 0:
                return text.raw[:count]
            room = -count

    def tokenize(self, text: str, marks: bool = True) -> list[int]:
        """Ids of a text; with `marks`, BOS in front where the file says so. None is a control token else."""
        content = text.encode()
        room = len(content) + 2  # a space before the text, and BOS
        ids = (c_int32 * room)()
        count = self._c.llama_tokenize(self._vocab, content, len(content), ids, room, marks, False)
        assert count >= 0, f"{-count} ids for {len(content)} bytes"
        return list(ids[:count])

    def logits(self, ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Logits after each id of a new text."""
        self._clear()
        return self._decode(ids, len(ids))

    def greedy(self, ids: Sequence[int], steps: int) -> list[int]:
        """The most probable next id, `steps` times."""
        found = [self.start(ids)]
        while len(found) < steps:
            found.append(self.step(found[-1]))
        return found

    def start(self, ids: Sequence[int]) -> int:
        """Reads a new text; returns the most probable id after it."""
        self._clear()
        return int(self._decode(ids, 1)[0].argmax())

    def step(self, token: int) -> int:
        """Reads one more id of the text; returns the most probable one after it."""
        return int(self._decode([token], 1)[0].argmax())

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], last: int) -> Float32[np.ndarray, "T V"]:
        """Reads some more ids of the text; returns the logits after each of the `last` ones."""
        count = len(ids)
        wanted = [0] * (count - last) + [1] * last
        batch = _Batch(n_tokens=count, token=(c_int32 * count)(*ids), logits=(c_int8 * count)(*wanted))
        _lines.clear()
        status = self._c.llama_decode(self._context, batch)
        if status != 0:
            raise UserError(f"llama.cpp cannot read {count} tokens (status {status}): {_said()}")
        shape = (last, self.vocab_size)
        values = ctypes.cast(self._c.llama_get_logits(self._context), POINTER(c_float))
        return np.ctypeslib.as_array(values, shape).copy()


def _installed_library() -> Path:
    """The library of xllamacpp; it is not imported, as that would start a server's modules."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"llama.cpp is not installed; install it with {INSTALL}")
    (found,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    return found


_lines: list[str] = []  # what llama.cpp said failed, since it was last cleared


@_Log
def _note(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        _lines.append(text.decode(errors="replace").strip())


def _said() -> str:
    return "; ".join(line for line in _lines if line) or "it does not say why"


@functools.cache
def load(library: Path | None = None, kernels: str = "") -> Any:
    """Loads the C functions, once; a `Model` does so by itself.

    Args:
      library: a shared library that exports them; None: that of xllamacpp, which has kernels for AVX2.
      kernels: of a build with several, the processor that they are for, such as "haswell", which has AVX2 and
        no VNNI; "": the best ones for this machine. A process has one choice.

    Raises:
      UserError: llama.cpp is not installed, or the library is none of its, or lacks the kernels.
    """
    path = _installed_library() if library is None else library.absolute()
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be loaded: {error}") from None
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is None:
            raise UserError(f"{path}: has no function {name}; use another version of llama.cpp, {INSTALL}")
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_note, None)
    if any(path.parent.glob(_KERNELS.format("*"))):
        _load_kernels(found, path.parent, kernels)
    found.llama_backend_init()
    return found


def _load_kernels(library: Any, folder: Path, kernels: str) -> None:
    if not kernels:
        library.ggml_backend_load_all_from_path(str(folder).encode())
        return
    file = folder / _KERNELS.format(kernels)
    if not library.ggml_backend_load(str(file).encode()):
        raise UserError(f"{file}: llama.cpp cannot load these kernels; {_said()}")


def _context_settings(defaults: _Parameters, context: int, exact: bool) -> _Parameters:
    """The default settings of a context, but for its length and, if `exact`, its cache and attention.

    Raises:
      UserError: the settings are not found, as in a version of llama.cpp that is not known.
    """
    words = np.frombuffer(defaults.bytes, np.uint32)
    # Position scaling, pooling, attention, flash attention: as the file, or llama.cpp, says.
    choices = _find(words, [_AUTO] * 4)
    # A callback and its data, two null pointers; then the types of keys and of values.
    cache = _find(words, [0, 0, 0, 0, _F16, _F16])
    if tuple(words[:4]) != _DEFAULT_SIZES or choices is None or cache is None:
        raise UserError(f"this version of llama.cpp has other settings than are known; use {INSTALL}")
    words[:2] = context  # a text is read in one batch
    if exact:
        words[choices + 3] = _OFF  # on a CPU, flash attention rounds to f16 whatever the cache holds
        words[cache + 4 : cache + 6] = _F32
    return defaults


def _find(words: np.ndarray, wanted: list[int]) -> int | None:
    """Where some words first stand."""
    places = range(len(words) - len(wanted))
    return next((i for i in places if words[i : i + len(wanted)].tolist() == wanted), None)
