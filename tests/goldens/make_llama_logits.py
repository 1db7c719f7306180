"""Writes llama_logits.npz: logits and losses of PyTorch's Llama for weights that this file makes up.

In an environment of its own (the project needs no PyTorch):
`pip install numpy torch==2.13.0 transformers==5.23.0 && python tests/goldens/make_llama_logits.py`

A shared layer plan is unrolled: each layer applied gets its own copy of its block. The tests run the same
weights, from the same NumPy seed, through `mobilellm_jax.model`.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("llama_logits.npz")
CASES = {
    "grouped_tied_shared": {
        "vocab_size": 37,
        "depth": 2,
        "width": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "ffn_width": 28,
        "share_embedding": True,
        "sharing": "0 1 1 0 1",
        "rope_base": 500.0,
        "norm_epsilon": 0.03,
    },
    "grouped_untied": {
        "vocab_size": 41,
        "depth": 3,
        "width": 18,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 4,
        "ffn_width": 36,
        "share_embedding": False,
        "sharing": "0 1 2",
        "rope_base": 10_000.0,
        "norm_epsilon": 1e-5,
    },
}


def make_weights(case):
    """Returns parameters in the layout of `mobilellm_jax.model`, float32."""
    rng = np.random.default_rng(0)
    d, f, h = case["width"], case["ffn_width"], case["head_dim"]
    u, n, k = case["depth"], case["num_heads"], case["num_kv_heads"]

    def matrix(*shape):
        return rng.uniform(-0.5, 0.5, shape).astype(np.float32)

    def gain(*shape):
        return {"gain": rng.uniform(0.5, 1.5, shape).astype(np.float32)}

    weights = {
        "embedding": matrix(case["vocab_size"], d),
        "final_norm": gain(d),
        "blocks": {
            "attention_norm": gain(u, d),
            "attention": {
                "query": matrix(u, d, n, h),
                "key": matrix(u, d, k, h),
                "value": matrix(u, d, k, h),
                "output": matrix(u, n, h, d),
            },
            "ffn_norm": gain(u, d),
            "ffn": {"gate": matrix(u, d, f), "up": matrix(u, d, f), "down": matrix(u, f, d)},
        },
    }
    if not case["share_embedding"]:
        weights["head"] = matrix(case["vocab_size"], d)
    return weights


def make_tokens(case):
    return np.random.default_rng(1).integers(0, case["vocab_size"], (2, 13))


def llama(case):
    """Returns logits and mean next-token loss of `transformers.LlamaForCausalLM`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = [int(block) for block in case["sharing"].split()]
    config = LlamaConfig(
        vocab_size=case["vocab_size"],
        hidden_size=case["width"],
        intermediate_size=case["ffn_width"],
        num_hidden_layers=len(plan),
        num_attention_heads=case["num_heads"],
        num_key_value_heads=case["num_kv_heads"],
        head_dim=case["head_dim"],
        rms_norm_eps=case["norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_base"]},
        tie_word_embeddings=case["share_embedding"],
        attn_implementation="eager",
    )
    weights = make_weights(case)
    blocks, d = weights["blocks"], case["width"]
    state = {
        "model.embed_tokens.weight": weights["embedding"],
        "model.norm.weight": weights["final_norm"]["gain"],
        "lm_head.weight": weights.get("head", weights["embedding"]),
    }
    for layer, u in enumerate(plan):
        attention, ffn = blocks["attention"], blocks["ffn"]
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            state[f"model.layers.{layer}.self_attn.{theirs}_proj.weight"] = (
                attention[ours][u].reshape(d, -1).T
            )
        state[f"model.layers.{layer}.self_attn.o_proj.weight"] = attention["output"][u].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            state[f"model.layers.{layer}.mlp.{name}_proj.weight"] = ffn[name][u].T
        state[f"model.layers.{layer}.input_layernorm.weight"] = blocks["attention_norm"]["gain"][u]
        state[f"model.layers.{layer}.post_attention_layernorm.weight"] = blocks["ffn_norm"]["gain"][u]
    torch_model = LlamaForCausalLM(config).eval()
    torch_model.load_state_dict({name: torch.tensor(array.copy()) for name, array in state.items()})
    tokens = torch.tensor(make_tokens(case))
    with torch.no_grad():
        output = torch_model(input_ids=tokens, labels=tokens)
    return output.logits.numpy(), output.loss.numpy()


if __name__ == "__main__":
    arrays = {}
    for name, case in CASES.items():
        arrays[f"{name}/logits"], arrays[f"{name}/loss"] = llama(case)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
