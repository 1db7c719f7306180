"""Rules: replies written by hand, prompts that say what is checked, and shares of a plain count."""

import pytest
from commands import command
from test_chat import speaker, workdir  # noqa: F401, a fixture

from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import instructions
from mobilellm_jax.inference.instructions import RULES, follow, parse, prompts

KEPT = [
    ("at_least", {"n": 3}, ["a b c", "It's well-known, yes."], ["a b", "", "it's well-known", "- - - -"]),
    ("at_most", {"n": 2}, ["a b", "a"], ["", "...", "a b c"]),
    ("json", {}, ['{"a": 1}', "[]"], ["", "3", "yes", '{"a": 1} yes', "[" * 100_000, '{"a": ' + "1" * 9999]),
    ("lower", {}, ["grüße, you!"], ["Grüße", "", "123"]),
    ("upper", {}, ["GRÜSSE, YOU!"], ["Grüße", "", "123"]),
    ("word", {"word": "water"}, ["Water!", "the water"], ["waters", "", "underwater"]),
    ("no_word", {"word": "water"}, ["waters", "fire"], ["Water!", ""]),
    ("end", {"phrase": "That is all."}, ["Cats. That is all."], ["That is all. Cats", "that is all.", ""]),
]


@pytest.mark.parametrize(("rule", "arguments", "kept", "broken"), KEPT, ids=[k[0] for k in KEPT])
def test_rules(rule, arguments, kept, broken):
    assert [text for text in kept if not RULES[rule].keeps(text, arguments)] == []
    assert [text for text in broken if RULES[rule].keeps(text, arguments)] == []


def test_every_rule_is_tested_and_says_what_it_checks():
    assert {rule for rule, *_ in KEPT} == RULES.keys()
    for rule in RULES:
        asked = list(prompts(rule, 48))
        assert len({text for text, _ in asked}) == 48
        for text, arguments in asked:
            assert all(str(value) in text for value in arguments.values())
        assert asked[:5] == list(prompts(rule, 5))


def test_shares_are_those_of_a_plain_count():
    """A model that repeats the wish: it has capital letters, and never the word that is asked for."""
    of = speaker(lambda text: text.split("\n")[1].partition(". ")[0])
    found = follow(of, "at_least", 8, 3)
    numbers = [len(text.partition(". ")[0].split()) for text, _ in prompts("at_least", 8)]
    share = sum(n >= a["n"] for n, (_, a) in zip(numbers, prompts("at_least", 8), strict=True)) / 8
    assert 0 < share < 1
    assert found["kept"] == share
    assert found["standard_error"] == pytest.approx((share * (1 - share) / 7) ** 0.5)
    assert found["words"] == pytest.approx(sum(numbers) / 8)
    assert follow(of, "lower", 4, 3)["kept"] == 0
    assert follow(of, "lower", 1, 3)["standard_error"] is None


def test_what_can_be_asked_for():
    assert parse(["all"]) == (tuple(RULES), 24)
    assert parse(["json", "all:3"])[0][0] == "json"
    assert parse(["word", "end:7"]) == (("word", "end"), 7)
    for names, message in ((["jsn"], "did you mean json?"), (["json:0"], "1 to 48"), (["json:x"], "1 to 48")):
        with pytest.raises(UserError) as error:
            parse(names)
        assert message in str(error.value)


def test_evaluate_prints_and_keeps_shares(workdir):  # noqa: F811
    result = command("experiments.evaluate", f"--workdir={workdir}", "--instructions=json:2")
    assert result.returncode == 0, result.stderr
    head, line, last = result.stdout.splitlines()
    assert head == instructions.HEAD
    assert line.startswith("json             2    0.0 ± 0.0    2.0    0.0%")
    assert last.endswith(f"see {workdir / 'instructions.json'}")
