"""Zero-shot evaluation: published data files, the harness's scores against plain arithmetic, and mistakes in one line."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from helpers import ANSWERS, PUBLISHED, STEM, fails, write_benchmarks, yaml_task
from pldr import load_model, load_tokenizer
from pldr.evaluation.published import LAYOUTS, PAPER_SUITE, read_benchmark, suite_averages
from pldr.evaluation.scoring import Scorer, read_calibration
from pldr.generation import generate_text

tasks = pytest.importorskip("lm_eval.tasks", reason="extra eval")
from lm_eval import simple_evaluate  # noqa: E402

from pldr.evaluation import harness  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def tasks_of_the_paper():
    """The harness's own tasks, but of their 13,000 files those of the paper's suite: an index of all takes seconds.

    The harness's command, in a test below, has them all.
    """
    folder = Path(tasks.__file__).parent
    folders = [folder / name for name in ("arc", "hellaswag", "openbookqa", "piqa", "siqa", "truthfulqa", "winogrande")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            harness, "TaskManager", partial(harness.TaskManager, include_path=folders, include_defaults=False)
        )
        harness._task_manager.cache_clear()
        yield
    harness._task_manager.cache_clear()


@pytest.fixture
def data(tmp_path):
    """Three questions of each benchmark, in their authors' files."""
    return write_benchmarks(tmp_path / "data")


class TestPublishedFiles:
    @pytest.mark.parametrize("task", LAYOUTS)
    def test_each_layout_has_rows_of_the_hubs_columns(self, data, task):
        (rows,) = read_benchmark(task, data).values()
        assert len(rows) == 3
        expected = {
            "arc_easy": {"question": STEM["stem"], "choices": {"text": ["mat", "dog"], "label": ["A", "B"]}, "answerKey": "A"},
            "openbookqa": {"question_stem": STEM["stem"], "answerKey": "B"},
            "hellaswag": {"label": "2", "ctx_b": "the dog", "activity_label": "cat"},
            "piqa": {"goal": "the cat", "sol1": "sat on a mat", "sol2": "ran to see a house", "label": 0},
            "social_iqa": {"answerC": "her", "label": "3"},
            "winogrande": {"option1": "house", "answer": "1"},
            "truthfulqa_mc1": {"mc1_targets": {"choices": list(ANSWERS), "labels": [1, 0, 0]}},
            "truthfulqa_mc2": {"mc2_targets": {"choices": ["who sat on a mat", "old", "the red house", "him at her town"],
                                               "labels": [1, 1, 0, 0]}},
        }.get(task, {})  # fmt: skip
        assert rows[0] == rows[0] | expected

    def test_every_benchmark_of_the_paper_has_a_layout(self):
        assert set(PAPER_SUITE) <= set(LAYOUTS)
        assert len(PAPER_SUITE) == 8

    @pytest.mark.parametrize(
        ("task", "file", "text", "message"),
        [
            ("piqa", "piqa/valid.jsonl", None, "piqa: no validation data; expected .*piqa/valid.jsonl, as"),
            ("piqa", "piqa/valid-labels.lst", None, "expected .*piqa/valid-labels.lst, as"),
            ("piqa", "piqa/valid.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c"}\n{"goal": "a", "so', "valid.jsonl, line 2: not valid JSON"),
            ("piqa", "piqa/valid.jsonl", '{"goal": "a", "sol1": "b"}\n' * 3, "valid.jsonl, line 1: has no field 'sol2'"),
            ("piqa", "piqa/valid.jsonl", "[1]\n" * 3, "line 1: expected a JSON object"),
            ("piqa", "piqa/valid.jsonl", b"\xff\xfe", "not valid UTF-8 at byte 0"),
            ("piqa", "piqa/valid.jsonl", "[" * 99999, "valid.jsonl, line 1: not valid JSON"),
            ("piqa", "piqa/valid.jsonl", '{"id": ' + "9" * 5000 + "}", "valid.jsonl, line 1: not valid JSON .*limit"),
            ("piqa", "piqa/valid.jsonl", '{"goal": "\\ud800", "sol1": "b", "sol2": "c"}\n' * 3, "line 1: text: not valid UTF-8"),
            ("piqa", "piqa/valid-labels.lst", "0\n1\n", "valid-labels.lst: 2 labels for 3 questions in .*valid.jsonl"),
            ("piqa", "piqa/valid-labels.lst", "0\n1\n2\n", "valid-labels.lst, line 3: label must be one of 0, 1, got '2'"),
            ("social_iqa", "siqa/dev-labels.lst", "1 0 1", "line 2: label must be one of 1, 2, 3, got '0'"),
            ("winogrande", "winogrande/dev.jsonl", "\n\n", "dev.jsonl: is empty; winogrande has no question"),
            ("winogrande", "winogrande/dev.jsonl", '{"sentence": "a", "answer": "1"}', "line 1: sentence has no _"),
            ("winogrande", "winogrande/dev.jsonl", '{"sentence": "a _", "answer": ""}', "line 1: answer must be 1 or 2"),
            ("hellaswag", "hellaswag/hellaswag_val.jsonl", '{"endings": ["a"], "label": 4}', "line 1: label 4 is none of 1"),
            ("hellaswag", "hellaswag/hellaswag_val.jsonl", '{"endings": ["a"], "label": 1e999}', "line 1: cannot convert float inf"),
            ("openbookqa", "openbookqa/test.jsonl", json.dumps({"question": STEM, "answerKey": "C"}), "line 1: answerKey 'C'"),
            ("openbookqa", "openbookqa/test.jsonl", json.dumps({"question": STEM | {"choices": [{"text": None, "label": "A"}]}, "answerKey": "A"}),
             "line 1: text must be a text, got None"),
            ("piqa", "piqa/valid.jsonl", '{"goal": ["a"], "sol1": "b", "sol2": "c"}\n' * 3, "line 1: goal must be a text, got"),
            ("truthfulqa_mc2", "truthfulqa/mc_task.json", '[{"question": "a",', "mc_task.json: not valid JSON"),
            ("truthfulqa_mc2", "truthfulqa/mc_task.json", "{}", "expected an array"),
            ("truthfulqa_mc2", "truthfulqa/mc_task.json", '[{"question": "a", "mc1_targets": {"b": 0}}]', "question 1: mc1_targets has no true"),
            ("truthfulqa_mc2", "truthfulqa/mc_task.json", '[{"question": "a", "mc1_targets": {"b": 1, "c": 0.5}}]', "question 1: mc1_targets has an answer that is neither"),
            ("mmlu", "piqa/valid.jsonl", "", "no local layout is known for mmlu"),
        ],
    )  # fmt: skip
    def test_mistakes_say_where(self, data, task, file, text, message):
        if text is None:
            (data / file).unlink()
        else:
            (data / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_benchmark(task, data)

    def test_few_shot_examples_come_from_the_training_file(self, data):
        with pytest.raises(FileNotFoundError, match=r"no train data; expected .*train.jsonl and .*train-labels.lst"):
            read_benchmark("piqa", data, few_shot=True)
        (data / "piqa/train.jsonl").write_text(json.dumps(PUBLISHED["piqa/valid.jsonl"]))
        (data / "piqa/train-labels.lst").write_text("1")
        assert read_benchmark("piqa", data, few_shot=True)["train"][0]["label"] == 1

    def test_averages(self):
        scores = dict.fromkeys(PAPER_SUITE, 0.25) | {"truthfulqa_mc2": 0.65}
        assert suite_averages(scores) == pytest.approx({"average": 0.3, "average without TruthfulQA": 0.25})


def test_the_papers_suite_offline(run, folder, data):
    """All eight benchmarks in all modes, from local files; PIQA once more by plain arithmetic."""
    (data / "piqa/valid.jsonl").write_text(
        "".join(json.dumps({"goal": goal, "sol1": one, "sol2": two}) + "\n" for goal, one, two in (
            ("the cat", "sat on a mat", "ran to see a house"),
            ("who ran", "a dog", "the old cat in town"),
            ("see him", "at her red house", "on a"),
        ))
    )  # fmt: skip
    (data / "piqa/valid-labels.lst").write_text("0\n1\n1\n")
    code, out, err = run("eval", folder, "--suite", "paper", "--data-dir", data, "--compare", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["modes"] == ["learned", "cached", "frozen"]
    assert {name: task["questions"] for name, task in report["tasks"].items()} == dict.fromkeys(PAPER_SUITE, 3)
    for mode in report["modes"]:
        scores = [report["tasks"][task]["scores"][mode][metric] for task, metric in PAPER_SUITE.items()]
        assert report["suite"]["averages"][mode]["average"] == pytest.approx(sum(scores) / 8)

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected, log_likelihoods = {}, {}
    for mode in report["modes"]:
        scorer = Scorer(model, mode, calibration=read_calibration(tokenizer, 64))
        right, right_by_byte, values = 0, 0, []
        for question, label in zip(read_benchmark("piqa", data)["validation"], (0, 1, 1), strict=True):
            context = tokenizer.encode(f"Question: {question['goal']}\nAnswer:", add_special_tokens=False)
            choices = [question["sol1"], question["sol2"]]
            wholes = [
                tokenizer.encode(f"Question: {question['goal']}\nAnswer: {c}", add_special_tokens=False)
                for c in choices
            ]
            scores = [s.log_likelihood for s in scorer.score([(context, whole[len(context) :]) for whole in wholes])]
            lengths = [len(choice.encode()) for choice in choices]
            right += scores.index(max(scores)) == label
            by_byte = [score / length for score, length in zip(scores, lengths, strict=True)]
            right_by_byte += by_byte.index(max(by_byte)) == label
            values += scores
        expected[mode] = {"acc": right / 3, "acc_norm": right_by_byte / 3}
        log_likelihoods[mode] = values
        found = report["tasks"]["piqa"]["scores"][mode]
        assert {name: found[name] for name in ("acc", "acc_norm")} == pytest.approx(expected[mode])
    for mode in ("cached", "frozen"):
        largest = max(abs(a - b) for a, b in zip(log_likelihoods["learned"], log_likelihoods[mode], strict=True))
        assert report["tasks"]["piqa"]["largest"][mode] == pytest.approx(largest, abs=1e-5)
    # A fresh model's modes disagree, and that is said.
    assert report["disagreement"] > 0.01
    assert "warning: G_LM depends on the text: where it comes from moves a log-likelihood" in err
    assert "warning: the modes' log-likelihoods of an answer differ by up to" in err


def test_the_table_and_the_default_mode(run, folder, data):
    text = data / "text.txt"
    text.write_text("the cat sat on a mat\n" * 40)
    code, out, _ = run("eval", folder, "--tasks", "piqa,winogrande", "--data-dir", data, "--limit", "2", "--batch-size", "1",
                       "--perplexity", text, "--threshold", "100", "--window", "32")  # fmt: skip
    assert code == 0
    for word in (
        "frozen: G_LM is a constant, frozen from calibration passages",
        "piqa",
        "winogrande",
        "acc_norm",
        "text.txt",
    ):
        assert word in out.replace("\n", " "), out
    assert "learned" not in out


def test_few_shot_examples_stand_before_the_question(run, folder, data, monkeypatch):
    from pldr.evaluation.harness import PldrLM

    example = json.dumps({"goal": "him", "sol1": "a red", "sol2": "old town"}) + "\n"
    (data / "piqa/train.jsonl").write_text(example)
    (data / "piqa/train-labels.lst").write_text("1\n")
    fails(
        run("eval", folder, "--tasks", "piqa", "--data-dir", data, "--num-fewshot", "1"), "too few to draw 1 examples"
    )
    (data / "piqa/train.jsonl").write_text(2 * example)
    (data / "piqa/train-labels.lst").write_text("1\n1\n")
    contexts = []
    asked = PldrLM.loglikelihood

    def ask(self, requests, **settings):
        contexts.extend(request.args[0] for request in requests)
        return asked(self, requests, **settings)

    monkeypatch.setattr(PldrLM, "loglikelihood", ask)
    code, out, err = run("eval", folder, "--tasks", "piqa", "--data-dir", data, "--num-fewshot", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"]["piqa"]["num_fewshot"] == 1
    assert set(contexts) == {"Question: him\nAnswer: old town\n\nQuestion: the cat\nAnswer:"}

    # In every mode the same examples, drawn from several.
    examples = [{"goal": f"who ran {n}", "sol1": "a red", "sol2": "old town"} for n in range(30)]
    (data / "piqa/train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (data / "piqa/train-labels.lst").write_text("1\n" * 30)
    contexts.clear()
    code, _, err = run(
        "eval", folder, "--tasks", "piqa", "--data-dir", data, "--num-fewshot", "2", "--compare", "--json"
    )
    assert code == 0, err
    third = len(contexts) // 3
    assert contexts[:third] == contexts[third : 2 * third] == contexts[2 * third :]
    assert len(set(contexts[:third])) > 1


def test_text_alone_in_every_mode(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat\n" * 40)
    code, out, _ = run("eval", folder, "--perplexity", text, "--compare", "--stride", "16", "--json")
    assert code == 0
    found = json.loads(out)["texts"][str(text)]
    assert list(found) == ["learned", "cached", "frozen"]
    for value in found.values():
        assert value["words"] == 6 * 40 + 40
        assert value["word_perplexity"] == pytest.approx(
            math.exp(value["nats_per_token"] * value["tokens"] / 280), rel=1e-6
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tasks: name some, or a suite, or text files for their perplexity"),
        (["--tasks", "piqq"], "no task 'piqq'; did you mean piqa"),
        (["--tasks", "piqa", "--limit", "0"], "limit: must be a number of questions"),
        (["--tasks", "piqa", "--limit", "2.7"], "limit: must be a number of questions"),
        (["--tasks", "piqa", "--limit", "inf"], "limit: must be a number of questions"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "--num-fewshot: must be 0 or more"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], "--data-dir: nowhere is not a folder"),
        (["--tasks", "piqa", "--data-dir", "."], "piqa: no validation data; expected piqa/valid.jsonl and piqa/valid-labels.lst"),
        (["--tasks", "yaml_of_nothing.yaml", "--allow-code"], "yaml_of_nothing.yaml: could not be loaded"),
        (["--tasks", "yaml_of_nothing.yaml"], "a task file can run code of its own (!function, templates)"),
        (["--perplexity", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--perplexity"], "--perplexity: needs text files"),
        (["text.txt"], "--perplexity: needs text files, and they need it"),
        (["--perplexity", "text.txt", "--batch-size", "none"], "--batch-size: must be a positive number or auto"),
        (["--perplexity", "text.txt", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--perplexity", "text.txt", "--stride", "65"], "stride: must be between 1 and the window of 64"),
        (["--perplexity", "text.txt", "--window", "65"], "window: must be between 1 and the context of 64"),
        (["--perplexity", "empty.txt"], "empty.txt: is empty"),
        # What would be ignored is refused.
        (["--tasks", "piqa", "--window", "8", "--stride", "4"], "--window, --stride: only text files can use it"),
        (["--perplexity", "text.txt", "--limit", "3", "--num-fewshot", "2"], "--limit, --num-fewshot: only tasks or a suite"),
        (["--perplexity", "text.txt", "--data-dir", ".", "--allow-code"], "--data-dir, --allow-code: only tasks or a suite"),
        (["--perplexity", "text.txt", "--compare", "--mode", "learned"], "--mode, --compare: choose one"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on a mat")
    (tmp_path / "empty.txt").write_text("\u200b\n")
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "yaml_of_nothing.yaml").write_text(json.dumps(yaml_task("nothing", tmp_path / "nothing.jsonl")))
    fails(run("eval", folder, *arguments), message)


def test_a_constant_operator_has_one_mode(run, folder, tmp_path, data):
    frozen = tmp_path / "frozen"
    assert run("freeze", folder, frozen, "--prompt", "the cat sat")[0] == 0
    text = data / "text.txt"
    text.write_text("the cat sat")
    fails(run("eval", frozen, "--perplexity", text, "--compare"), "constant, so that frozen is its only mode")
    fails(run("eval", frozen, "--perplexity", text, "--mode", "learned"), "constant, so that frozen is its only mode")
    fails(
        run("eval", frozen, "--perplexity", text, "--calibration", text),
        "calibration: this model's operator is constant",
    )
    code, out, err = run("eval", frozen, "--tasks", "piqa", "--data-dir", data, "--json")
    assert code == 0
    assert json.loads(out)["disagreement"] == 0.0
    assert err == ""  # no warning, and no bars where there is no terminal


def test_data_that_the_hub_does_not_give_is_one_line(monkeypatch):
    from pldr.evaluation.harness import load_tasks

    def unreachable(manager, names):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", unreachable)
    with pytest.raises(ValueError, match=r"piqa: could not be loaded \(ConnectionError: Couldn't reach 'baber/piqa' on the Hub\); "
                       r"without the hub, give data_dir a folder with piqa/valid.jsonl and piqa/valid-labels.lst"):  # fmt: skip
        load_tasks(["piqa"])


class TestTheHarnessModel:
    @pytest.fixture
    def lm(self, folder):
        from pldr.evaluation.harness import PldrLM

        return lambda **settings: PldrLM(str(folder), **settings)

    @staticmethod
    def requests(kind, *arguments):
        from lm_eval.api.instance import Instance

        return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]

    def test_texts_are_greedy_and_end_at_a_stop_string(self, lm):
        settings = {"until": [], "max_gen_toks": 12}
        prompts = ["the cat sat", "who ran to see", "the dog ran"]
        for mode, cache in (("learned", "none"), ("cached", "kv+g")):
            model = lm(mode=mode)
            texts = model.generate_until(self.requests("generate_until", *((prompt, settings) for prompt in prompts)))
            expected = [
                generate_text(model.scorer.model, model.tokenizer, prompt, max_new_tokens=12, cache=cache).text
                for prompt in prompts
            ]
            assert texts == expected
        stop = texts[0][3:6]
        (cut,) = model.generate_until(
            self.requests("generate_until", (prompts[0], {"until": [stop], "max_gen_toks": 12}))
        )
        assert cut == texts[0][: texts[0].index(stop)]

    def test_more_text_than_the_context_holds_is_refused(self, lm):
        with pytest.raises(ValueError, match="up to 64 tokens, the model's context is 64"):
            lm(mode="cached").generate_until(self.requests("generate_until", ("the cat", {"max_gen_toks": 64})))

    def test_whole_texts(self, lm):
        model = lm()
        text = "the cat sat on a mat and saw that dog " * 12
        ids = model.tok_encode(text)
        assert len(ids) > 2 * 64
        pairs = [([3], ids[:64])]
        for start in range(64, len(ids), 64):
            scored = ids[start : start + 64]
            pairs.append((ids[:start][-(65 - len(scored)) :], scored))
        expected = sum(score.log_likelihood for score in model.scorer.score(pairs))
        found = model.loglikelihood_rolling(self.requests("loglikelihood_rolling", (text,), ("the cat",)))
        assert found[0] == pytest.approx(expected, abs=1e-4)
        assert len(found) == 2

    def test_a_text_without_context_follows_the_end_of_a_document(self, lm):
        model = lm(mode="cached")
        ((score, _),) = model.loglikelihood(self.requests("loglikelihood", ("", "the cat sat")))
        expected = model.scorer.score([([model.tokenizer.eos_token_id], model.tok_encode("the cat sat"))])[0]
        assert score == expected.log_likelihood

    def test_a_continuation_without_tokens_is_named(self, lm):
        with pytest.raises(ValueError, match="continuation ' ' has no token"):
            lm().loglikelihood(self.requests("loglikelihood", ("the cat", " ")))

    def test_the_entry_point_names_it(self):
        from importlib.metadata import entry_points

        from pldr.evaluation.harness import PldrLM

        (point,) = entry_points(group="lm_eval.models", name="pldr")
        assert point.load() is PldrLM


def test_bound_on_a_share_by_hand():
    from pldr.evaluation.harness import share_bound

    assert share_bound(0, 1838) == pytest.approx(1 - 0.05 ** (1 / 1838), rel=1e-9)  # (1 - p)^n = 0.05
    assert share_bound(9, 10) == pytest.approx(0.95 ** (1 / 10), rel=1e-9)  # 1 - p^n = 0.05
    one = share_bound(1, 10)
    assert (1 - one) ** 10 + 10 * one * (1 - one) ** 9 == pytest.approx(0.05, rel=1e-9)
    assert share_bound(10, 10) == 1.0
    assert share_bound(0, 10, 0.5) < share_bound(0, 10) < share_bound(1, 10)


def test_differences_between_two_runs():
    from types import SimpleNamespace

    from pldr.evaluation.harness import _differences

    task = SimpleNamespace(OUTPUT_TYPE="multiple_choice", doc_to_choice=lambda doc: doc["choices"])

    def sample(doc, *values, choices=("a", "bbb")):
        arguments = [("q", f" {text}") for text in choices]
        return {"doc_id": doc, "doc": {"choices": choices}, "resps": [[(value, False)] for value in values],
                "arguments": arguments}  # fmt: skip

    before = [sample(0, -1.0, -2.0), sample(1, -2.0, -5.0), sample(2, -4.0, -5.0)]
    assert _differences(task, before, before) == (0, 0.0)
    # The first answer flips by log-likelihood; the second by that a character alone (-5/3 against -2 and -1.6); the third not.
    after = [sample(0, -2.5, -2.0), sample(1, -1.6, -5.0), sample(2, -4.5, -5.0)]
    assert _differences(task, before, after) == (2, 1.5)
    # What follows the choices is scored without the question, for mutual information, and is no answer.
    more = [sample(0, -1.0, -2.0, -0.5, -0.1)]
    assert _differences(task, more, [sample(0, -1.0, -2.0, -0.1, -0.5)]) == (0, 0.4)
    with pytest.raises(AssertionError, match="not asked the same"):
        _differences(task, before, [sample(0, -1.0, -2.0, choices=("a", "c")), *before[1:]])
    text = [{"doc_id": 0, "resps": [["a dog"]], "arguments": [("q", {})]}]
    other = [{"doc_id": 0, "resps": [["a cat"]], "arguments": [("q", {})]}]
    assert _differences(task, text, other) == (1, 0.0)


def test_what_the_harness_prints_does_not_get_into_the_json(run, folder, tmp_path, data):
    """Bootstrapped metrics announce themselves on standard output; sampling gives every mode the same luck."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in read_benchmark("piqa", data)["validation"]))
    likelihood = yaml_task("likelihood", rows, output_type="loglikelihood", doc_to_target=" {{sol1}}",
                           metric_list=[{"metric": "perplexity"}])  # fmt: skip
    del likelihood["doc_to_choice"]
    sampled = yaml_task("sampled", rows, output_type="generate_until", doc_to_target="{{sol1}}",
                        generation_kwargs={"until": ["."], "do_sample": True, "temperature": 2.0, "max_new_tokens": 6},
                        metric_list=[{"metric": "exact_match"}])  # fmt: skip
    del sampled["doc_to_choice"]
    for task in (likelihood, sampled):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    frozen = tmp_path / "frozen"
    assert run("freeze", folder, frozen, "--prompt", "the cat sat")[0] == 0
    names = f"{tmp_path / 'likelihood.yaml'},{tmp_path / 'sampled.yaml'}"
    found = []
    for _ in range(2):
        code, out, err = run("eval", frozen, "--tasks", names, "--allow-code", "--json")
        assert code == 0, err
        found.append(json.loads(out))
    assert found[0]["tasks"] == found[1]["tasks"]
    assert found[0]["tasks"]["likelihood"]["scores"]["frozen"]["perplexity"] > 1


@pytest.mark.parametrize("mode", ["frozen", "learned"])
def test_simple_evaluate_knows_the_model(run, folder, tmp_path, data, mode):
    """lm_eval's own function, from Python, by a task's name: every answer and the scores are those of `pldr eval`."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in read_benchmark("piqa", data)["validation"]))
    (tmp_path / "choice.yaml").write_text(json.dumps(yaml_task("choice", rows)))
    found = simple_evaluate(
        model="pldr",
        model_args={"pretrained": str(folder), "mode": mode},
        tasks=["choice"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    assert found["config"]["model"] == "pldr"
    assert len(found["samples"]["choice"]) == len(rows.read_text().splitlines())
    code, out, err = run("eval", folder, "--tasks", tmp_path / "choice.yaml", "--allow-code", "--mode", mode, "--json")
    assert code == 0, err
    assert found["results"]["choice"]["acc,none"] == json.loads(out)["tasks"]["choice"]["scores"][mode]["acc"]
    model = harness.PldrLM(folder, mode=mode, device="cpu")
    asked = [tuple(pair) for sample in found["samples"]["choice"] for pair in sample["arguments"]]
    expected = model.loglikelihood([harness.Instance("loglikelihood", {}, pair, 0) for pair in asked])
    answered = [tuple(answer[0]) for sample in found["samples"]["choice"] for answer in sample["resps"]]
    assert answered == expected


@pytest.mark.slow
def test_releases_of_the_harness_that_read_entry_points_find_the_model():
    """None on the index does (0.4.13 is the newest), but its registry takes an entry point as one that does will hand it in."""
    code = """
from importlib.metadata import entry_points
import sys, lm_eval.models
from lm_eval.api.registry import get_model, model_registry
(entry,) = entry_points(group="lm_eval.models", name="pldr")
model_registry.register(entry.name, target=entry)
assert "pldr" not in sys.modules
assert get_model("pldr") is sys.modules["pldr.evaluation.harness"].PldrLM
import pldr.evaluation.lm_eval
assert get_model("pldr") is pldr.evaluation.harness.PldrLM
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_harnesss_own_command_knows_the_model(run, folder, tmp_path, data):
    """A frozen model has the same scores as "pldr", as "hf", and under pldr eval; a learned one runs too.

    The three runs share a process, in which each is started as `python -m pldr.evaluation.lm_eval` starts it.
    """
    frozen = tmp_path / "frozen"
    assert run("freeze", folder, frozen, "--prompt", "the cat sat")[0] == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in read_benchmark("piqa", data)["validation"]))
    choice = yaml_task("choice", rows)
    rolling = yaml_task("rolling", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{sol2}}",
                        metric_list=[{"metric": "word_perplexity"}])  # fmt: skip
    del rolling["doc_to_choice"]
    for task in (choice, rolling):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    names = [str(tmp_path / "choice.yaml"), str(tmp_path / "rolling.yaml")]
    models = [
        ("pldr", f"pretrained={frozen}"),
        ("hf", f"pretrained={frozen},dtype=float32,prefix_token_id=3"),
        ("pldr", f"pretrained={folder},mode=cached"),
    ]
    runs = [
        [
            "--model",
            model,
            "--model_args",
            arguments,
            "--tasks",
            ",".join(names),
            "--device",
            "cpu",
            "--output_path",
            str(n),
        ]
        for n, (model, arguments) in enumerate(models)
    ]
    code = """
import json, runpy, sys
for sys.argv[1:] in json.loads(sys.argv[1]):
    runpy.run_module("pldr.evaluation.lm_eval", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(runs)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    scores, modes = [], []
    for n in range(3):
        (record,) = (tmp_path / str(n)).rglob("results*.json")
        results = json.loads(record.read_text())
        scores.append((results["results"]["choice"]["acc,none"], results["results"]["rolling"]["word_perplexity,none"]))
        modes.append(results["config"].get("mode"))
    assert modes == ["frozen", None, "cached"]
    code, out, _ = run("eval", frozen, "--tasks", ",".join(names), "--allow-code", "--json")
    assert code == 0
    ours = {name: task["scores"]["frozen"] for name, task in json.loads(out)["tasks"].items()}
    assert scores[0] == pytest.approx((ours["choice"]["acc"], ours["rolling"]["word_perplexity"]), rel=1e-5)
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
