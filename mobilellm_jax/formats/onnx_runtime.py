"""ONNX Runtime GenAI, which runs an exported folder on phones and PCs, here on CPU threads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32

from mobilellm_jax.formats import tools


class Model:
    """An exported folder, on one CPU thread unless said otherwise. It holds one text at a time."""

    def __init__(
        self, folder: Path, threads: int = 1, context: int | None = None, graph: str = "model.onnx"
    ) -> None:
        """Loads a folder.

        Args:
          folder: with model.onnx and genai_config.json.
          threads: of the CPU.
          context: positions that fit in the key/value cache; None: as many as a training row has.
          graph: a file in the folder.

        Raises:
          UserError: onnxruntime-genai is not installed.
        """
        tools.require("onnx", "onnxruntime_genai")
        import onnxruntime_genai  # pyright: ignore[reportMissingImports]

        genai = cast(Any, onnxruntime_genai)  # has no types
        self._genai, self._context = genai, context
        config = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"filename": graph, "session_options": options}}}))
        self._model = genai.Model(config)
        self._text = None

    def start(self, ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Reads a new text; returns the logits after each of its ids."""
        settings = self._genai.GeneratorParams(self._model)
        if self._context is not None:
            settings.set_search_options(max_length=self._context, do_sample=False)
        self._text = self._genai.Generator(self._model, settings)
        return self.extend(ids)

    def extend(self, ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Reads more of the text; returns the logits after each of its ids."""
        assert self._text is not None, "start a text first"
        self._text.append_tokens(np.array(ids, np.int32))
        return np.array(self._text.get_output("logits"))[0]
