"""What uses of a block have of their own, against loops over layers in NumPy."""

import jax
import numpy as np
import pytest
from conftest import apply, init, loss_and_gradients, random_batch, random_params, tiny_config, tiny_model
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from test_diagnostics import numpy_nats
from test_model import _numpy_attention, _numpy_ffn, _numpy_norm

from mobilellm_jax import parameters
from mobilellm_jax.config import MeshConfig
from mobilellm_jax.costs import accounting
from mobilellm_jax.diagnostics.diagnosis import diagnose
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import GREEDY, Generator
from mobilellm_jax.loops import with_repeats
from mobilellm_jax.model.adapters import adapted, by_path
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.model.uses import as_blocks, written_out
from mobilellm_jax.parallel import partition
from mobilellm_jax.quantization.apply import quantize, weight_bytes
from mobilellm_jax.quantization.schemes import parse
from mobilellm_jax.sharing import loop_starts, uses_of

BLOCK = {"loop_gains": True, "loop_rank": 3, "loop_scale": "learned"}  # joined to the weights of a block
ALL = {**BLOCK, "loop_embedding": True, "loop_norm": True}
IMMEDIATE = {"sharing": "immediate", "num_repeats": 2}
REPEAT_ALL = {"sharing": "repeat_all", "num_repeats": 2}
SLOW = pytest.mark.slow
SHAPE = {"parameterization": "completep", "base_depth": 3, "base_width": 24}


def numpy_hidden(params, tokens, m, layers):
    """The state after the last layer, [T, D]; `layers` as in `LAYERS`."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    loops, residual, x = params.get("loops", {}), multipliers(m).residual, params["embedding"][tokens]
    for u, place, use, starts in layers:
        block = jax.tree.map(lambda w, u=u: w[u], params["blocks"])
        own = jax.tree.map(
            lambda w, place=place: w[place], {k: loops.get(k, {}) for k in ("attention", "ffn")}
        )
        if m.loop_norm and starts and use > 0:
            x = _numpy_norm(x, loops["norm"]["gain"], m)
        if m.loop_embedding and starts:
            x = x + loops["embedding"][use]
        for part, compute in (("attention", _numpy_attention), ("ffn", _numpy_ffn)):
            gains = loops[f"{part}_norm"]["gain"][place] if m.loop_gains else block[f"{part}_norm"]["gain"]
            weights = dict(block[part])
            for name, pair in own[part].items():
                if name != "scale":
                    weights[name] = weights[name] + np.tensordot(pair["reduce"], pair["expand"], 1)
            scale = (
                float(m.loop_scale.split()[use]) if m.loop_scale[:1].isdigit() else own[part].get("scale", 1)
            )
            x = x + residual * scale * compute(_numpy_norm(x, gains, m), weights, m)
    return x


# Of each layer: block, place in the plan of training, uses before, whether a loop begins.
LAYERS = {
    "immediate": [(0, 0, 0, True), (0, 1, 1, True), (1, 2, 0, True), (1, 3, 1, True)],
    "repeat_all": [(0, 0, 0, True), (1, 1, 0, False), (0, 2, 1, True), (1, 3, 1, False)],
    "0 1 0 0": [(0, 0, 0, True), (1, 1, 0, False), (0, 2, 1, True), (0, 3, 2, True)],
}


@pytest.mark.parametrize(
    "extras",
    [
        {**ALL, **REPEAT_ALL, **SHAPE},
        pytest.param({**ALL, **IMMEDIATE, "scan_unroll": 4, "loop_targets": "query|down"}, marks=SLOW),
        pytest.param({"loop_gains": True, "loop_norm": True, "sharing": "0 1 0 0"}, marks=SLOW),
        {"loop_rank": 2, "loop_embedding": True, "loop_scale": "1 0.5 0.25", "sharing": "0 1 0 0"},
    ],
    ids=lambda extras: extras["sharing"] + " " + next(iter(extras)),
)
def test_forward_and_gradient_are_those_of_a_plain_loop(extras):
    """The gradient by a central difference in float64, along a random direction."""
    m = tiny_model(**extras)
    params, (tokens, targets) = random_params(m), random_batch(m)
    layers = LAYERS[m.sharing]

    def numpy_loss(params):
        rows = zip(tokens[:2], targets[:2], strict=True)
        return sum(sum(numpy_nats(params, numpy_hidden(params, x, m, layers), y, m)) for x, y in rows)

    (nats, _), grads = loss_and_gradients(params, tokens[:2], targets[:2], m)
    assert float(nats) == pytest.approx(numpy_loss(params), rel=1e-4)
    rng, size = np.random.default_rng(3), 1e-5
    for part in ("loops", "blocks"):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params[part])
        ends = [
            numpy_loss({**params, part: jax.tree.map(lambda x, d, s=s: x + s * d, params[part], direction)})
            for s in (size, -size)
        ]
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), grads[part], direction)))
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=1e-3, abs=1e-2)


@SLOW
def test_uses_are_alike_at_first():
    tokens, _ = random_batch(tiny_model())
    without = tiny_model(**REPEAT_ALL)
    extras = {**ALL, "loop_norm": False}
    expected, actual = (
        apply(init(jax.random.key(0), m), tokens, m) for m in (without, tiny_model(**REPEAT_ALL, **extras))
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_loops_begin_where_a_repeated_block_starts_over():
    plan = (0, 1, 2, 1, 2, 3)
    assert uses_of(plan) == (0, 0, 0, 1, 1, 0)
    assert loop_starts(plan) == (False, True, False, True, False, False)
    assert loop_starts((0, 1, 2, 2, 1, 0)) == (True, False, False, True, False, False)
    assert not any(loop_starts((0, 1, 2)))


def test_fewer_loops_take_what_is_of_the_first():
    trained = tiny_model(**{**ALL, **IMMEDIATE, **SHAPE})
    m, params = with_repeats(trained, 1), random_params(trained)
    tokens, _ = random_batch(m)
    x = numpy_hidden(params, tokens[0], m, [(0, 0, 0, True), (1, 2, 0, True)])
    logits = _numpy_norm(x, params["final_norm"]["gain"], m) @ params["embedding"].T
    np.testing.assert_allclose(apply(params, tokens[:1], m)[0], logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(
        UserError,
        match=r"^num_repeats=3: model.loop_gains=True is for the 2 uses of training; use at most 2$",
    ):
        with_repeats(trained, 3)
    assert with_repeats(tiny_model(**IMMEDIATE, loop_norm=True), 3).effective_depth == 6


@SLOW
def test_generation_writes_the_blocks_out():
    m = tiny_model(**ALL, **REPEAT_ALL)
    params, tokens = random_params(m), [3, 1, 4]
    for (token,) in Generator(params, m, GREEDY, context=16).start([tokens], 4, None, 0):
        padded = np.array([tokens + [0] * (8 - len(tokens))], np.int32)
        assert token == int(np.argmax(apply(params, padded, m)[0, len(tokens) - 1]))
        tokens = [*tokens, token]


def test_blocks_that_are_written_out_are_a_plain_model():
    m = tiny_model(**BLOCK, **REPEAT_ALL, **SHAPE)
    params, (tokens, _) = random_params(m), random_batch(m)
    blocks, plain = as_blocks(params, m, "export")
    assert blocks.keys() == {"embedding", "blocks", "final_norm"}
    assert (plain.plan, plain.differing_uses, multipliers(plain).residual) == ((0, 1, 2, 3), "", 3 / 4)
    np.testing.assert_allclose(apply(blocks, tokens, plain), apply(params, tokens, m), rtol=1e-4, atol=1e-4)
    for field in ("loop_embedding", "loop_norm"):
        with pytest.raises(UserError, match=rf"^export: model.{field}=True changes the state between blocks"):
            as_blocks(params, tiny_model(**REPEAT_ALL, **{field: True}), "export")
    alike = tiny_model(**REPEAT_ALL)
    assert written_out(params, alike) == (params, alike)


def test_what_uses_have_is_counted_sharded_and_decayed():
    m = tiny_model(**ALL, **REPEAT_ALL, loop_targets="query$|down$", ffn_kind="relu")
    plain = tiny_model(**REPEAT_ALL, ffn_kind="relu")
    new, old = accounting.parameters(m), accounting.parameters(plain)
    # D = 24, N H = 40, F = 32; 4 layers, 2 uses, rank 3.
    assert new.norms - old.norms == (4 - 2) * 2 * 24 + 2 * 4 + 24
    assert new.attention - old.attention == 4 * 3 * (24 + 40)
    assert new.ffn - old.ffn == 4 * 3 * (32 + 24) + 2 * 24
    # Both read the gains of 4 layers; of a block in two loops they are read twice, but counted once.
    more = accounting.decode_bytes_per_token(m) - accounting.decode_bytes_per_token(plain)
    assert more == 4 * (new.total - old.total - 2 * 2 * 24)
    mesh = AbstractMesh((2, 2, 2), partition.AXES, axis_types=(AxisType.Auto,) * 3)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), m))
    specs = {path: s.spec for path, s in by_path(partition.shardings(shapes, mesh)).items()}
    assert specs["loops/attention/query/reduce"] == PartitionSpec(None, "fsdp", None)
    assert specs["loops/attention/query/expand"] == PartitionSpec(None, None, "tensor", None)
    assert specs["loops/ffn_norm/gain"] == PartitionSpec(None, None)
    decayed = {of.path for of in parameters.declared(m) if of.path.startswith("loops/") and not of.is_gain}
    assert decayed == {
        "loops/embedding",
        *(f"loops/{at}/{end}" for at in ("attention/query", "ffn/down") for end in ("reduce", "expand")),
    }
    assert weight_bytes(m, None) == 4 * new.total


@SLOW
def test_updates_and_vectors_of_uses_are_rounded_and_gains_are_not():
    m = tiny_model(**ALL, **REPEAT_ALL)
    params = random_params(m)
    rounded = by_path(quantize(params, m, parse("w4"))[0])
    for path, leaf in by_path(params).items():
        if parameters.parameter(path).is_gain:
            assert np.array_equal(rounded[path], leaf), path
        else:
            assert 0 < np.abs(rounded[path] - leaf).max() <= 0.5 / 7 / 2 * 1.001, path  # of 15 steps to 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loop_gains": True},
            r"^model.loop_gains: True has no meaning in the plan 0 1, which applies every",
        ),
        (
            {"loop_scale": "learned", "sharing": "1 0"},
            r"^model.loop_scale: 'learned' has no meaning in the plan 1 0",
        ),
        ({"loop_rank": 4, "sharing": "repeat_all"}, r"^model.loop_rank: 4 has no meaning"),
        (
            {"loop_scale": "1", **IMMEDIATE},
            r"^model.loop_scale: '1' is not valid; .* has 2, such as '1 0.5'$",
        ),
        ({"loop_scale": "1 -1", **IMMEDIATE}, r"^model.loop_scale: '1 -1' is not valid"),
        ({"loop_scale": "learnt", **IMMEDIATE}, r"^model.loop_scale: 'learnt' is not valid"),
        ({"loop_rank": -1, **IMMEDIATE}, r"^model.loop_rank: -1 is not valid"),
        (
            {"loop_targets": "(", **IMMEDIATE},
            r"^model.loop_targets: '\(' is not valid; expected a regular expression",
        ),
    ],
)
def test_extras_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.loop_rank": 25},
            r"^model.loop_rank: 25 is above the 24 inputs of blocks/attention/query; use ",
        ),
        (
            {"model.loop_targets": "head", "model.loop_rank": 1},
            r"^model.loop_targets: 'head' is found in none of",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused_before_anything_is_compiled(changes, message):
    sharing = {f"model.{name}": value for name, value in IMMEDIATE.items()}
    with pytest.raises(UserError, match=message):
        adapted(tiny_config(**sharing, **changes))


def test_drawn_loops_stay_within_what_has_parameters():
    fields = {"model.sharing": "immediate", "model.num_repeats": 2, "train.loops": "1..3"}
    with pytest.raises(
        UserError, match=r"^train.loops: '1..3' has more loops than model.num_repeats=2, for "
    ):
        tiny_config(**fields, **{"model.loop_gains": True})
    tiny_config(**fields, **{"model.loop_norm": True})
    tiny_config(**{**fields, "train.loops": "1..2"}, **{"model.loop_gains": True})


@SLOW
def test_a_diagnosis_takes_each_use_for_a_layer_of_its_own():
    m = tiny_model(**ALL, **REPEAT_ALL)
    params, (tokens, targets) = random_params(m), random_batch(m)
    targets = np.maximum(targets, 0)
    rows = np.concatenate([tokens, targets[:, -1:]], axis=1)
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = diagnose(params, m, mesh, lambda: iter([rows]))
    layers = LAYERS["repeat_all"]

    def loss(layers):
        rows_of = [(row[:-1], row[1:]) for row in rows]
        return np.mean([numpy_nats(params, numpy_hidden(params, x, m, layers), y, m) for x, y in rows_of])

    assert found.plan == [0, 1, 2, 3]
    assert found.loss == pytest.approx(loss(layers), rel=1e-4)
    without = [loss(layers[:place] + layers[place + 1 :]) for place in range(4)]
    assert found.skipped == pytest.approx(without, rel=1e-4)
    assert found.lens[-1] == pytest.approx(found.loss, rel=1e-4)


# --- early exit -----------------------------------------------------------------------------------------


def plain_decode(params, m, prompt, count, above, loop_ends):
    """Greedy tokens, layers applied and largest probabilities at the exits, one position after the other."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    caches, tokens, applied, seen = [[] for _ in m.plan], list(prompt), [], []

    def probabilities(x):
        logits = _numpy_norm(x, params["final_norm"]["gain"], m) @ params["embedding"].T
        p = np.exp(logits - logits.max())
        return p / p.sum()

    for t in range(len(prompt) + count - 1):
        x, used = params["embedding"][tokens[t]], 0
        for place, u in enumerate(m.plan):
            block = jax.tree.map(lambda w, u=u: w[u], params["blocks"])
            y = _numpy_norm(x, block["attention_norm"]["gain"], m)
            caches[place].append(y)  # the state that keys and values are made of
            if used != place:
                continue  # it has left
            ys, w = np.array(caches[place]), block["attention"]
            x = x + _numpy_attention(ys, w, m)[-1]
            x = x + _numpy_ffn(_numpy_norm(x, block["ffn_norm"]["gain"], m), block["ffn"], m)
            used = place + 1
            if used in loop_ends and t >= len(prompt):
                seen.append(probabilities(x).max())
                used -= seen[-1] > above
        used = used if used == len(m.plan) else used + 1
        if t >= len(prompt):
            applied.append(used)
        if t >= len(prompt) - 1:
            tokens.append(int(probabilities(x).argmax()))
    return tokens[len(prompt) :], applied, seen


@SLOW
@pytest.mark.parametrize("sharing", [{"sharing": "repeat_all", "num_repeats": 3}, {"depth": 3}], ids=str)
def test_generation_leaves_loops_out_once_it_is_sure(sharing):
    m = tiny_model(**sharing)
    params, prompt = random_params(m), [3, 1, 4, 1, 5]
    ends = (2, 4) if m.sharing == "repeat_all" else (1, 2)
    *_, seen = plain_decode(params, m, prompt, 9, 1.0, ends)
    for above in (0.0, float(np.median(seen)), 1.0):
        expected, applied, _ = plain_decode(params, m, prompt, 9, above, ends)
        generator = Generator(params, m, GREEDY, 32, exit_above=above)
        assert [token for (token,) in generator.start([prompt], 9, None, 0)] == expected
        assert generator.layers_applied == applied
        assert len(set(applied)) == 1 or 0 < above < 1
    with pytest.raises(UserError, match=r"^exit_above: 1.5 is not valid"):
        Generator(params, m, GREEDY, 32, exit_above=1.5)
    with pytest.raises(UserError, match=r"^exit_above: layers: 1 is not valid; expected 2 to 128"):
        Generator(params, tiny_model(depth=1), GREEDY, 32, exit_above=0.5)
