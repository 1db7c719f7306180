"""Our models in lm-evaluation-harness: prompts as its definitions print them, answers as its own models'.

Skipped without lm-eval: python -m pip install -e '.[eval]'. The comparison item by item needs the extra `hf`
too: there lm-eval runs the exported model by transformers, which shares no code with this project.
"""

import dataclasses
import json

import numpy as np
import pytest
from commands import command
from conftest import random_params, tiny_config
from test_sweep import write_study

from mobilellm_jax.analysis.records import read_record
from mobilellm_jax.config import to_dict
from mobilellm_jax.data import save_tokenizer
from mobilellm_jax.data.tokenizers import train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface
from mobilellm_jax.inference.local_tasks import LOCAL_TASKS
from mobilellm_jax.parallel import partition
from mobilellm_jax.quantization.apply import quantize
from mobilellm_jax.quantization.schemes import parse
from mobilellm_jax.runs.directory import TOKENIZER, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.storage.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries of others
pytest.importorskip("lm_eval", reason="lm-eval is not installed: python -m pip install -e '.[eval]'")

from mobilellm_jax.inference import harness  # noqa: E402, after the check

TEXT = "the a red blue cat dog sun moon runs sleeps on under near house tree . then she they it"
WORDS = TEXT.split()


def rows_of(task, rng):
    """Returns a dozen rows of a local file, of random words."""

    def text(least=1, most=9):
        return " ".join(rng.choice(WORDS, rng.integers(least, most)))

    def question(number):
        return {
            "question": text(),
            "choices": [text() for _ in range(number)],
            "gold": int(rng.integers(number)),
        }

    for _ in range(12):
        if task == "boolq":  # some of them longer than the model's context
            yield {"passage": text(1, 90), **question(2), "choices": ["no", "yes"]}
        elif task == "social_iqa":
            yield {"context": text(), **question(3)}
        elif task == "hellaswag":
            yield {**question(4), "context": f"{text()}: {text()}. {text()}"}
        elif task == "winogrande":
            yield {**question(2), "sentence": f"{text()} _ {text()}"}
        elif task == "triviaqa":
            yield {"question": text(), "aliases": [text(1, 3), text(1, 3)]}
        elif task == "race":
            yield {"article": text(), "problems": [question(4), question(4)]}
        else:
            yield question(2 if task == "piqa" else int(rng.integers(3, 6)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for i, (task, local) in enumerate(LOCAL_TASKS.items()):
        lines = [json.dumps(row) + "\n" for row in rows_of(task, np.random.default_rng(i))]
        (folder / f"{local.stem}_test.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with random weights and a tokenizer, whose blocks are applied twice."""
    tokenizer = train_bpe("bpe:320", [TEXT + "? Question: Answer:\n"] * 2)
    fields = {"model.vocab_size": 320, "model.sharing": "immediate", "model.num_repeats": 2}
    config = tiny_config(**fields, **{"data.sequence_length": 64})
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, {"params": random_params(config.model)}, None)
    checkpoints.close()
    save_tokenizer(tokenizer, folder / TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def adapter(workdir):
    """Returns a function from whether texts begin with BOS to the model of the run."""
    config, params = open_run(workdir)
    mesh = partition.make_mesh(config.mesh)  # eight devices
    return lambda bos: harness.Adapter(params, config, open_tokenizer(workdir), mesh, bos)


# What lm-eval's definitions print of the rows below, by hand: (context, continuation) of each request.
PROMPTS = {
    "arc_easy": (
        {"question": "Why?", "choices": ["a", "b", "c"], "gold": 2},
        [("Question: Why?\nAnswer:", f" {choice}") for choice in "abc"],
    ),
    "boolq": (
        {"passage": "It is.", "question": "is it?", "choices": ["no", "yes"], "gold": 1},
        [("It is.\nQuestion: is it?\nAnswer:", " no"), ("It is.\nQuestion: is it?\nAnswer:", " yes")],
    ),
    "piqa": (
        {"question": "Cut.", "choices": ["knife", "spoon"], "gold": 0},
        [("Question: Cut.\nAnswer:", " knife"), ("Question: Cut.\nAnswer:", " spoon")],
    ),
    "social_iqa": (
        {"context": "C.", "question": "Q?", "choices": ["a", "b", "c"], "gold": 1},
        [("Q: C. Q?\nA:", f" {choice}") for choice in "abc"],
    ),
    "hellaswag": (
        {"context": "Golf: A man swings. the ball", "choices": ["x", "y"], "gold": 1},
        [("Golf: A man swings. The ball", " x"), ("Golf: A man swings. The ball", " y")],
    ),
    "openbookqa": (
        {"question": "The sun", "choices": ["a", "b"], "gold": 0},
        [("The sun", " a"), ("The sun", " b")],
    ),
    "winogrande": (
        {"sentence": "So _ won it.", "choices": ["Ann", "Bob"], "gold": 0},
        [("So Ann", " won it."), ("So Bob", " won it.")],
    ),
    "race": (
        {
            "article": "T.",
            "problems": [
                {"question": "First?", "choices": ["a", "b", "c", "d"], "gold": 3},
                {"question": "Last?", "choices": ["e", "f", "g", "h"], "gold": 0},
            ],
        },
        [("Article: T.\n\nQuestion: First?\nAnswer: d\nLast?", f" {choice}") for choice in "efgh"],
    ),
}


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts_are_those_of_the_definitions(task, tmp_path, adapter):
    row, expected = PROMPTS[task]
    (tmp_path / f"{LOCAL_TASKS[task].stem}.jsonl").write_text(json.dumps(row))
    tasks, _ = harness.load_tasks([task], tmp_path)
    lm = adapter(True)
    lm.loglikelihood = lambda requests: [(-float(i), False) for i, _ in enumerate(requests)]
    result = harness.run_task(lm, task, tasks[task], None)
    assert [tuple(arguments) for arguments in result.samples[0]["arguments"]] == expected
    last = row["problems"][-1] if task == "race" else row
    assert result.metrics["acc"][0] == (last["gold"] == 0)  # the first is the most likely
    assert "acc_norm" in result.metrics
    assert result.correct == str(int(last["gold"] == 0))
    assert (result.chance, result.majority) == (1 / len(expected), 1.0)


def test_baselines_count_the_questions(data_dir, adapter):
    tasks, left_out = harness.load_tasks(["arc_easy", "triviaqa"], data_dir)
    assert left_out == []
    lm = adapter(True)
    result = harness.run_task(lm, "arc_easy", tasks["arc_easy"], 10)
    rows = [json.loads(line) for line in (data_dir / "arc_easy_test.jsonl").read_text().splitlines()][:10]
    assert result.items == 10
    assert result.chance == pytest.approx(np.mean([1 / len(row["choices"]) for row in rows]))
    assert result.majority == max(np.bincount([row["gold"] for row in rows])) / 10
    value, error = result.metrics["acc"]
    assert error == pytest.approx(np.sqrt(value * (1 - value) / 9))
    assert len(result.correct) == 10
    assert result.correct.count("1") == 10 * value
    result = harness.run_task(lm, "triviaqa", tasks["triviaqa"], 4)
    assert (result.metrics.keys(), result.chance, result.majority) == ({"exact_match"}, None, None)
    assert result.correct is None


def test_answers_are_kept_in_the_order_of_the_questions():
    answers = [{"doc_id": place, "acc": acc} for place, acc in ((2, 1.0), (0, 0.0), (1, 1))]
    assert harness.correct(answers) == "011"
    assert harness.correct([*answers, answers[0]]) is None
    assert harness.correct([{"doc_id": 0, "acc": 0.5}]) is None
    assert harness.correct([{"doc_id": 0}]) is None
    assert harness.correct([{"doc_id": i, "acc": 1.0} for i in range(20_001)]) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["piqaa"], "there is no task 'piqaa'; did you mean piqa"),
        (["blimp"], "the task 'blimp' cannot be read from local files"),
        (["piqa"], r"there is no file piqa\*\.jsonl for piqa"),
        (["mobilellm"], "there is no file for any of arc_easy, arc_challenge, boolq, piqa"),
    ],
)
def test_tasks_that_cannot_be_loaded(names, message, tmp_path):
    with pytest.raises(UserError, match=message):
        harness.load_tasks(names, tmp_path)


def test_of_a_group_tasks_without_a_file_are_left_out(tmp_path, data_dir):
    (tmp_path / "piqa.jsonl").write_bytes((data_dir / "piqa_test.jsonl").read_bytes())
    tasks, left_out = harness.load_tasks(["mobilellm"], tmp_path)
    assert (list(tasks), len(left_out)) == (["piqa"], 7)


def test_the_command_prints_a_table_and_keeps_results(workdir, data_dir):
    arguments = [f"--workdir={workdir}", f"--data_dir={data_dir}", "--limit=5", "--tasks=piqa,boolq"]
    done = command("experiments.evaluate", *arguments, env={"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    head, piqa, boolq, average, *rest = [line.split() for line in done.stdout.splitlines()]
    assert head[:5] == ["task", "items", "acc", "acc_norm", "chance"]
    assert (piqa[:2], boolq[:2], average[:2]) == (["piqa", "5"], ["boolq", "5"], ["average,", "2"])
    assert "prompts were truncated to their last" in done.stdout
    document = json.loads((workdir / "zero_shot.json").read_text())
    assert document.keys() == {"piqa", "boolq"}
    assert document["piqa"]["metrics"].keys() == {"acc", "acc_norm"}
    assert document["boolq"]["requests_shortened"] > document["piqa"]["requests_shortened"] == 0
    assert rest[-1] == ["see", str(workdir / "zero_shot.json")]


@pytest.mark.slow
def test_quantized_models_are_asked_the_same_questions(workdir, data_dir, tmp_path):
    """Of weights alone, the scores are those of a model that holds the rounded weights."""
    (tmp_path / "text.txt").write_text("a few words " * 20)
    arguments = [f"--workdir={workdir}", f"--data_dir={data_dir}", "--limit=12", "--tasks=piqa,arc_easy"]
    text = f"--text=files:{tmp_path}/text.txt"
    done = command("experiments.quantize", *arguments, text, "--schemes=w8a8,w2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("piqa (12): acc ") == 2
    found = json.loads((workdir / "quantized.json").read_text())
    assert found.keys() == {"w8a8", "w2"}
    config, params = open_run(workdir)
    rounded, _ = quantize(params, config.model, parse("w2"))
    tokenizer = open_tokenizer(workdir)
    lm = harness.Adapter(rounded, config, tokenizer, partition.make_mesh(config.mesh), True)
    tasks, _ = harness.load_tasks(["piqa", "arc_easy"], data_dir)
    for name, task in tasks.items():
        expected = harness.run_task(lm, name, task, 12).metrics
        kept = found["w2"]["zero_shot"][name]["metrics"]
        assert {metric: of["value"] for metric, of in kept.items()} == {
            m: v for m, (v, _) in expected.items()
        }
    assert found["w8a8"]["zero_shot"].keys() == tasks.keys()


def run_command(name, *arguments):
    """Returns the output of a command that succeeds."""
    environment = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    done = command(f"experiments.{name}", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_sweep_asks_every_run_and_text_and_tasks_go_in_one_command(tmp_path, data_dir):
    study, workdir = write_study(tmp_path), tmp_path / "w"
    length = "--config.data.sequence_length=128"
    arguments = [f"--config={study}", f"--workdir={workdir}", length, "--seeds=1", "--jobs=1"]
    tasks = [f"--data_dir={data_dir}", "--limit=5"]
    run_command("sweep", *arguments)
    path = workdir / "results" / "mini" / "tiny" / "none-s0.json"
    trained = read_record(path)
    assert trained.zero_shot is None
    # two finished runs, asked afterwards; then only what is new; then nothing
    assert run_command("sweep", *arguments, *tasks, "--tasks=piqa").count("  acc: piqa") == 2
    out = run_command("sweep", *arguments, *tasks, "--tasks=piqa,boolq")
    assert (out.count("  acc: boolq"), out.count("piqa")) == (2, 0)
    assert "acc:" not in run_command("sweep", *arguments, *tasks, "--tasks=piqa,boolq")
    slurm = ["slurm", *arguments[:-1], "--cluster=local", "--only=reverse", *tasks, "--tasks=piqa,winogrande"]
    assert "0 of 1 points are complete" in run_command(*slurm)
    assert "1 of 1 points are complete" in run_command(*slurm)
    record = read_record(path)
    assert record.zero_shot is not None
    assert record.zero_shot.keys() == {"piqa", "boolq"}
    assert dataclasses.replace(record, zero_shot=None) == trained
    report = (workdir / "reports" / "mini-tiny.md").read_text()
    assert "## Zero-shot accuracy" in report
    run = workdir / "runs" / "mini" / "tiny" / "none-s0"
    text = f"--text=files:{tmp_path}/1.txt"
    out = run_command("evaluate", f"--workdir={run}", text, *tasks, "--tasks=piqa,winogrande")
    first, *rest = out.splitlines()
    assert "bits per byte" in first
    assert rest[-1] == f"see {path}"
    after = read_record(path).zero_shot
    assert after is not None
    assert after["piqa"]["metrics"] == record.zero_shot["piqa"]["metrics"]
    assert (after["winogrande"]["items"], after["winogrande"]["step"]) == (5, 4)


# --- against lm-eval's own model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(workdir, tmp_path_factory):
    """Returns a function like that of `adapter`, to the exported model in transformers."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[hf]'")
    transformers = pytest.importorskip("transformers", reason="transformers: pip install -e '.[hf]'")
    accelerate = "lm-eval's model needs it: pip install accelerate"
    pytest.importorskip("accelerate", reason=accelerate)
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    torch.set_num_threads(1)
    target = tmp_path_factory.mktemp("exported") / "out"
    huggingface.export_run(workdir, target, "float32")
    exported = transformers.AutoModelForCausalLM.from_pretrained(target)

    def make(bos):
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
        if not bos:  # an exported one puts it there
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        return HFLM(pretrained=exported, tokenizer=tokenizer, batch_size=7)

    return make


@pytest.mark.parametrize("bos", [True, False])
def test_every_item_equals_that_of_transformers(bos, adapter, theirs, data_dir):
    names = [name for name in LOCAL_TASKS if name != "triviaqa"]
    runs = []
    for lm in (adapter(bos), theirs(bos)):
        tasks, _ = harness.load_tasks(names, data_dir)
        runs.append([harness.run_task(lm, name, task, None) for name, task in tasks.items()])
    different = 0
    for ours, other in zip(*runs, strict=True):
        assert ours.items == other.items == 12
        for sample, expected in zip(ours.samples, other.samples, strict=True):
            assert sample["arguments"] == expected["arguments"]
            log_p, greedy = (np.array(column) for column in zip(*sample["filtered_resps"], strict=True))
            log_p_, greedy_ = (np.array(column) for column in zip(*expected["filtered_resps"], strict=True))
            np.testing.assert_allclose(log_p, log_p_, rtol=1e-4)
            same = [sample[name] == expected[name] for name in ("acc", "acc_norm")]
            different += not all(same) or bool((greedy != greedy_).any())
        assert ours.metrics == other.metrics
    print(f"{different} of {12 * len(names)} items differ")
    assert different == 0


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=values, idx=0) for values in arguments]


def test_texts_and_generated_texts_equal_those_of_transformers(adapter, theirs):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, length)) for length in (1, 5, 30, 120, 200)]
    ours, other = adapter(False), theirs(False)
    rolling = instances("loglikelihood_rolling", [(text,) for text in texts])
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(rolling), other.loglikelihood_rolling(rolling), rtol=1e-4
    )
    # transformers would put BOS before such a text twice, and score the second one
    assert adapter(True).loglikelihood_rolling(rolling) == ours.loglikelihood_rolling(rolling)
    for settings in ({"until": ["a", "."], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 5}):
        prompts = instances("generate_until", [(text, {"do_sample": False, **settings}) for text in texts])
        assert ours.generate_until(prompts) == other.generate_until(prompts)


@pytest.mark.slow
def test_the_benchmark_finds_no_answer_that_differs(theirs, tmp_path):
    run_command("bench", "--only=zero_shot", "--quick", f"--workdir={tmp_path}")
    (path,) = tmp_path.rglob("zero_shot.json")
    lines = {line["name"]: line for line in json.loads(path.read_text())["lines"]}
    different = next(line for name, line in lines.items() if name.endswith("that differ"))
    assert (different["values"], different["at_most"]) == ([0.0], 0.0)
    assert lines["4 x 128: ours / Hugging Face"]["median"] > 0
