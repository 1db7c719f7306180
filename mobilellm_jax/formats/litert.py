"""Export of a run to LiteRT, by `export_hf` of litert-torch: a bundle that LiteRT-LM runs.

The bundle (.litertlm) has the graph (.tflite), with weights of 32 or 8 bits, and the tokenizer. Each layer
has weights of its own there.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from mobilellm_jax.formats import tools
from mobilellm_jax.formats.parity import Parity, compare, our_logits, random_ids
from mobilellm_jax.storage.files import new_file

TYPES = ("f32",)
# As for GGUF. Sums have another order: 1.7e-6 of the largest logit for MobileLLM-125M at initialisation.
BOUND = 1e-4
_PREFILL = 64  # tokens of a prompt that are read at once; a shorter rest is padded
# litert-torch 0.10.0 imports a module of tensorflow, without naming it among its requirements. It has the
# same content as one that is installed.
_EXPORTER = """
import importlib.util, json, sys
from ai_edge_litert import schema_py_generated
for name in ("tensorflow", "tensorflow.lite", "tensorflow.lite.python"):
    spec = importlib.util.spec_from_loader(name, loader=None)
    sys.modules[name] = importlib.util.module_from_spec(spec)
sys.modules["tensorflow.lite.python"].schema_py_generated = schema_py_generated
from litert_torch.generative.export_hf.export import export
export(**json.loads(sys.argv[1]))
"""


def export_run(workdir: Path, out: Path, kind: str) -> tools.Exported:
    """Exports a trained or imported run to a bundle, and compares what LiteRT makes of it with the run.

    Args:
      workdir: the run.
      out: the file to create.
      kind: of the weights, one of `TYPES`.

    Raises:
      UserError: the extra is not installed, there is no intact run, the converter cannot take the model, or
        `out` exists or cannot be written.
      ParityError: LiteRT computes something else. There is no file then.
    """
    assert kind in TYPES, kind
    tools.require("litert", "litert_torch", "ai_edge_litert", "torch", "transformers")
    with new_file("out", out) as path:
        run = tools.open_exportable(workdir, "litert")
        with tempfile.TemporaryDirectory(prefix=".litert-", dir=path.parent) as temporary:
            here = Path(temporary)
            run.write_folder(here / "hf")
            context = run.config.data.sequence_length
            settings = {
                "model": str(here / "hf"),
                "output_dir": str(here / "made"),
                "keep_temporary_files": True,  # the graph, which is compared
                "prefill_lengths": [min(_PREFILL, context)],
                "cache_length": context,
                "quantization_recipe": "none",
            }
            tools.convert("litert", here, "-c", _EXPORTER, json.dumps(settings))
            found = _parity(here / "made" / "model.tflite", run)
            os.replace(here / "made" / "model.litertlm", path)
    return tools.Exported(run.original, run.tokenizer, found)


class Model:
    """A graph in LiteRT's interpreter, with one key/value cache."""

    def __init__(self, path: Path) -> None:
        """Loads a graph; UserError if LiteRT is not installed."""
        tools.require("litert", "ai_edge_litert")
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

        self._graph = Interpreter(model_path=str(path), num_threads=1)
        self._graph.allocate_tensors()
        self._decode = self._graph.get_signature_runner("decode")
        self._position, self._cache = 0, self._empty()

    def _empty(self) -> dict[str, np.ndarray]:
        details = self._decode.get_input_details()
        return {
            name: np.zeros(of["shape"], of["dtype"])
            for name, of in details.items()
            if name not in ("tokens", "input_pos", "mask")
        }

    def extend(self, ids: Sequence[int]) -> Float32[np.ndarray, "T V"]:
        """Reads more of the text, token by token; returns the logits after each."""
        return np.stack([self._step(token) for token in ids])

    def prefill(self, ids: Sequence[int]) -> None:
        """Reads a prompt at once, no longer than the graph takes; the logits after it are not computed."""
        (name,) = [name for name in self._graph.get_signature_list() if name.startswith("prefill")]
        run = self._graph.get_signature_runner(name)
        length = run.get_input_details()["tokens"]["shape"][1]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        positions = np.arange(length, dtype=np.int32)
        self._cache = self._kept(
            run(tokens=tokens, input_pos=positions, mask=self._mask(positions), **self._cache)
        )
        self._position = len(ids)

    def _step(self, token: int) -> Float32[np.ndarray, " V"]:
        at = np.array([self._position], np.int32)
        found = self._decode(
            tokens=np.array([[token]], np.int32), input_pos=at, mask=self._mask(at), **self._cache
        )
        self._cache, self._position = self._kept(found), self._position + 1
        return found["logits"].reshape(-1)

    def _mask(self, positions: np.ndarray) -> np.ndarray:
        """What is added to scores: 0 up to the position of a token, and the least number beyond it."""
        length = self._decode.get_input_details()["mask"]["shape"][-1]
        seen = np.arange(length) <= positions[:, None]
        return np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)[None, None]

    def _kept(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: outputs[name] for name in self._cache}


def _parity(path: Path, run: tools.Run) -> Parity:
    """Compares logits: token by token after a prompt that was read at once."""
    ids = random_ids(run.config)
    prompt = max(1, len(ids) // 2)
    ours_TV = our_logits(run.params, run.config.model, ids)[prompt:]
    there = Model(path)
    there.prefill(ids[:prompt])
    return compare("LiteRT", there.extend(ids[prompt:]), ours_TV, ours_TV, BOUND)
