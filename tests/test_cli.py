"""The command line in-process: what it prints, and that every mistake is one line, a non-zero code and nothing written."""

import json
import resource
import signal
import subprocess
import sys

import pytest
import torch

import pldr
from helpers import FIXTURES, WORDS, assert_close, fails
from pldr import PldrConfig, PldrForCausalLM, deductive_outputs, load_model
from pldr.cli import main


def test_generate_without_a_model_uses_the_one_that_ships_with_pldr(run):
    code, out, _ = run("generate", "Once upon a time", "--max-new-tokens", "8", "--json")
    assert code == 0
    fields = json.loads(out)
    assert (len(fields["token_ids"]), fields["prompt"], fields["finish_reason"]) == (8, "Once upon a time", "length")


def test_help_and_version_start_without_torch():
    code = (
        "import sys; sys.argv = ['pldr', '--help']\n"
        "from pldr.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in result.stdout
    result = subprocess.run([sys.executable, "-m", "pldr", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"pldr {pldr.__version__}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (lambda process: process.send_signal(signal.SIGINT), 130, "pldr: interrupted"),
        (lambda process: process.stdout.close(), 1, ""),
    ],
    ids=["Ctrl-C", "a reader that closes"],
)
def test_a_stopped_command_leaves_no_traceback(stop, code, said):
    """In the midst of a text: after its first characters."""
    command = [sys.executable, "-m", "pldr", "generate", "Once upon a time", "--stream", "--max-new-tokens", "900"]
    with subprocess.Popen([*command, "--cache", "none"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1)
        stop(process)
        assert process.stderr.read().decode().strip() == said
    assert process.returncode == code


class TestGenerate:
    def test_text_json_and_stream_agree(self, run, folder):
        code, text, _ = run("generate", folder, "the cat sat", "--max-new-tokens", 6)
        assert code == 0
        code, out, _ = run("generate", folder, "the cat sat", "--max-new-tokens", 6, "--json")
        result = json.loads(out)
        assert code == 0
        assert result["text"] + "\n" == text
        assert len(result["token_ids"]) <= 6
        assert result["tokens_per_second"] > 0
        assert run("generate", folder, "the cat sat", "--max-new-tokens", 6, "--stream")[1] == text
        assert run("generate", folder, "-", "--max-new-tokens", 6, stdin="the cat sat")[1] == text

    def test_the_text_goes_right_behind_the_prompt(self, folder):
        """With its leading space where it begins a new word: prompt and text together are the decoded whole."""
        from pldr.generation import generate_text

        model, tokenizer = load_model(folder), pldr.load_tokenizer(folder)
        word = tokenizer("dog")["input_ids"][0]
        letter = next(i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) == "s")
        for token, expected in ((word, " "), (letter, "s")):
            with torch.no_grad():
                model.lm_head.bias.zero_()[token] = 1e4
            result = generate_text(model, tokenizer, "the cat sat", max_new_tokens=3)
            assert result.token_ids == [token] * 3
            assert result.text[0] == expected
            whole = tokenizer("the cat sat")["input_ids"] + result.token_ids
            assert "the cat sat" + result.text == tokenizer.decode(whole)

    def test_cache_modes_and_sampling(self, run, folder):
        model = load_model(folder)
        tokenizer = pldr.load_tokenizer(folder)
        ids = tokenizer("that dog ran to see", return_tensors="pt").input_ids
        for mode, (kv, g) in {"kv+g": (1, 1), "kv": (1, 0), "g": (0, 1), "none": (0, 0)}.items():
            expected = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=bool(kv), use_g_cache=bool(g))
            out = run("generate", folder, "that dog ran to see", "--max-new-tokens", 12, "--cache", mode, "--json")[1]
            found = json.loads(out)
            assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()
            assert found["finish_reason"] == ("length" if len(found["token_ids"]) == 12 else "end")
        sampled = [run("generate", folder, "the", "--temperature", 1.5, "--top-p", 0.9, "--seed", seed)[1]
                   for seed in (1, 1, 2)]  # fmt: skip
        assert sampled[0] == sampled[1]
        assert sampled[0] != sampled[2]
        assert run("generate", folder, "the", "--top-k", 1, "--seed", 3)[1] == run("generate", folder, "the")[1]
        assert run("generate", folder, "the", "--beams", 3)[0] == 0
        begun = run("generate", folder, "", "--json", "--max-new-tokens", 4)[1]
        assert json.loads(begun)["token_ids"] == model.generate(torch.tensor([[3]]), max_new_tokens=4)[0, 1:].tolist()
        assert run("generate", folder, "the", "--dtype", "bfloat16")[0] == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["the cat " * 60], "leave no room in the context of 64"),
            (["the", "--max-new-tokens", "64"], "--max-new-tokens: must be between 1 and 60"),
            (["the", "--max-new-tokens", "0"], "--max-new-tokens: must be between 1"),
            (["the", "--temperature", "0"], "temperature: must be positive, got 0.0"),
            (["the", "--temperature=-1"], "temperature: must be positive"),
            (["the", "--temperature", "nan"], "temperature: must be positive"),
            (["the", "--temperature", "inf"], "temperature: must be positive, got inf: at least 1e-06 and finite"),
            (["the", "--temperature", "1e-300"], "temperature: must be positive, got 1e-300: at least 1e-06"),
            (["the", "--top-p", "0"], "--top-p: must be in (0, 1]"),
            (["the", "--top-p", "1.1"], "--top-p: must be in (0, 1]"),
            (["the", "--top-k=-1"], "pldr: --top-k: must be 0 (all tokens) or more"),
            (["the", "--beams", "0"], "beams: must be at least 1"),
            (["the", "--beams", "2", "--stream"], "beam search knows its text only at the end"),
            (["the", "--stream", "--json"], "--stream, --json and --prompts-file: choose one"),
            (["the", "--prompts-file", "x"], "--prompts-file: holds the prompts; leave the other one out"),
            (["the", "--device", "warp"], "device: warp can not be used here"),
            (["bytes \udcff"], "prompt: not valid UTF-8"),
        ],
    )
    def test_bad_input(self, run, folder, arguments, message):
        fails(run("generate", folder, *arguments), message)

    def test_bad_folders(self, run, folder, tmp_path):
        fails(run("generate", tmp_path / "nowhere", "the"), "no such model folder")
        (tmp_path / "empty").mkdir()
        fails(run("generate", tmp_path / "empty", "the"), "neither config.json nor a .pth file")
        fails(run("generate", FIXTURES / "v51-small", "the"), "no tokenizer.json and no *.model file")
        fails(run("generate", FIXTURES / "v51-small", "the", "--tokenizer", folder),
              "tokenizer: has 290 tokens, the model has vocab_size=97")  # fmt: skip
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        fails(run("generate", folder, "the"), "damaged safetensors file")


class TestFreezeConvertInfo:
    def test_freeze_from_prompts(self, run, folder, tmp_path):
        code, out, _ = run("freeze", folder, tmp_path / "frozen", "--prompt", "the cat", "--prompt", "that dog ran")
        assert code == 0
        assert "constant operator" in out
        model, tokenizer = load_model(folder), pldr.load_tokenizer(tmp_path / "frozen")
        each = [deductive_outputs(model, tokenizer(text, return_tensors="pt").input_ids).G_LM[:, 0]
                for text in ("the cat", "that dog ran")]  # fmt: skip
        frozen = load_model(tmp_path / "frozen")
        G_LM = torch.stack([layer.self_attn.operator.G_LM for layer in frozen.model.layers])
        assert_close(G_LM, (each[0] + each[1]) / 2, max_error=1e-6)
        assert run("generate", tmp_path / "frozen", "the cat")[0] == 0

        (tmp_path / "prompts.txt").write_text("the cat\n\nthat dog ran\n")
        run("freeze", folder, tmp_path / "again", "--prompts-file", tmp_path / "prompts.txt", "--trainable")
        again = load_model(tmp_path / "again")
        assert again.config.operator_trainable
        assert torch.equal(again.model.layers[0].self_attn.operator.G_LM, G_LM[0])

    def test_freeze_with_a_file(self, run, folder, tmp_path):
        fails(run("freeze", folder, tmp_path / "out", "--g-lm", FIXTURES / "v51G-random" / "predefined_G_LM.pkl",
                  "--prompt", "x"), "pass either prompts")  # fmt: skip
        code, _, _ = run("freeze", folder, tmp_path / "out", "--g-lm", FIXTURES / "v51G-random" / "predefined_G_LM.pkl")
        assert code == 0
        assert load_model(tmp_path / "out").config.operator == "constant"

    def test_freeze_mistakes_write_nothing(self, run, folder, tmp_path):
        from safetensors.torch import save_file

        before = sorted(tmp_path.iterdir())
        fails(run("freeze", folder, tmp_path / "out"), "pass either prompts")
        fails(run("freeze", folder, tmp_path / "out", "--prompt", ""), "prompt: is empty")
        fails(run("freeze", folder, folder, "--prompt", "the"), "exists and is not empty")
        fails(run("freeze", folder, tmp_path / "out", "--g-lm", tmp_path / "none.pkl"), "no such file")
        assert sorted(tmp_path.iterdir()) == before
        save_file({"G_LM": torch.zeros(3, 2, 16, 16)}, tmp_path / "G.safetensors")
        fails(run("freeze", folder, tmp_path / "out", "--g-lm", tmp_path / "G.safetensors"), "has 3 layers")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["v51-small", "v52-small", "v51G-random"])
    def test_convert(self, run, tmp_path, name):
        rope = ["--rope", "halves"] if name == "v52-small" else []
        assert run("convert", FIXTURES / name, tmp_path / "ours", *rope)[0] == 0
        code, out, _ = run("convert", FIXTURES / name / "hub", tmp_path / "hub", "--to", "hub")
        assert code == 0
        assert "hub layout" in out
        one, other = load_model(tmp_path / "ours").state_dict(), load_model(tmp_path / "hub").state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())

    def test_convert_brings_the_tokenizer(self, run, folder, tmp_path, toy_model_file):
        run("convert", folder, tmp_path / "hub", "--to", "hub")
        assert pldr.load_tokenizer(tmp_path / "hub")("the cat")["input_ids"]
        fails(run("convert", FIXTURES / "v51-small", tmp_path / "out", "--tokenizer", toy_model_file),
              "has 290 tokens, the model has vocab_size=97")  # fmt: skip

    def test_convert_mistakes_write_nothing(self, run, tmp_path):
        for arguments, message in [
            (["nowhere"], "no such model folder"),
            ([FIXTURES / "v51-small" / "hub", "--rope", "halves"], "apply to the reference layout only"),
        ]:
            fails(run("convert", arguments[0], tmp_path / "out", *arguments[1:]), message)
        fails(run("convert", FIXTURES / "v51-small", "/proc/nowhere/out"), "/proc/")
        assert list(tmp_path.iterdir()) == []

    def test_info(self, run, folder, tmp_path):
        code, out, _ = run("info", folder, "--json")
        facts = json.loads(out)
        assert code == 0
        assert facts["parameters"] == load_model(folder).num_parameters() == sum(facts["parameters_by_part"].values())
        assert facts["operators"] == {"learned": 2}
        # fp32: 4 bytes; K and V of 2 layers and width 32; G_LM of 2 layers, 2 heads, 16 × 16.
        assert facts["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 4
        assert facts["g_cache_bytes_per_sequence"] == 2 * 2 * 16 * 16 * 4
        assert "learned" in run("info", folder)[1]
        run("freeze", folder, tmp_path / "frozen", "--prompt", "the cat")
        facts = json.loads(run("info", tmp_path / "frozen", "--json")[1])
        assert facts["operators"] == {"constant": 2}
        assert facts["g_cache_bytes_per_sequence"] == 0
        assert facts["parameters_by_part"]["operator"] == 0
        assert run("info", FIXTURES / "v52-small", "--rope", "halves")[0] == 0


class TestTrain:
    def test_mistakes(self, run, tmp_path):
        fails(run("train", tmp_path / "none.yaml"), "no recipe of that name")
        (tmp_path / "r.yaml").write_text(f"output: {tmp_path}/out\ndata: {{train: ['{tmp_path}/*.txt']}}\n")
        fails(run("train", tmp_path / "r.yaml", "optimization.step=3"), "unknown key 'step'; did you mean 'steps'")
        fails(run("train", tmp_path / "r.yaml", "seed=many"), "seed: must be of type int")
        fails(run("train", tmp_path / "r.yaml"), "*.txt matches no file")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]

    def test_trains(self, run, tmp_path, toy_model_file):
        (tmp_path / "text.txt").write_text("the cat sat on a mat and saw that dog . " * 60)
        (tmp_path / "r.yaml").write_text(
            f"output: {tmp_path}/out\n"
            "model: {config: {hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1, metric_learner_width: 16}}\n"
            f"data: {{train: ['{tmp_path}/*.txt'], tokenizer: {toy_model_file}, sequence_length: 16}}\n"
            "optimization: {steps: 2, batch_size: 2, warmup_steps: 1, precision: fp32}\n"
        )
        code, out, _ = run("train", tmp_path / "r.yaml", "--json")
        assert code == 0
        summary = json.loads(out)
        assert summary["tokens"] == 64
        assert run("generate", tmp_path / "out", "the cat", "--max-new-tokens", 3)[0] == 0
        fails(run("train", tmp_path / "r.yaml"), "exists and is not empty")

    def test_plot(self, run, tmp_path):
        from matplotlib.image import imread

        rows = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.9},
                {"step": 2, "G_variation": [1e-2, 1e-3], "G_frozen_difference": -1e-6}]  # fmt: skip
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run("plot", tmp_path)[:2] == (0, f"{tmp_path / 'curves.png'}\n")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert run("plot", tmp_path, "--output", tmp_path / "other.png")[0] == 0
        narrow = imread(tmp_path / "curves.png").shape
        rows += [{"step": 3, "skipped_loss": "nan", "skipped_rows": [1]},
                 {"step": 4, "loss": None, "learning_rate": 1e-3, "grad_norm": 2.0, "accuracy": 0.5},
                 {"step": 4, "eval_loss": 1.8, "eval_regularised_loss": 1.9, "G_rank": [3.0, 2.5], "row_gain": [0.5, 1.5],
                  "row_norm": [1.0, 3.0], "G_log10_determinant": [-3.0, None]}]  # fmt: skip
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run("plot", tmp_path)[0] == 0
        wide = imread(tmp_path / "curves.png")
        assert (wide.shape[0], wide.shape[1]) == (
            pytest.approx(3 * narrow[0], abs=3),
            pytest.approx(narrow[1] * 4 / 3, abs=3),
        )
        assert (wide[0, 0, 3], wide[..., 3].max()) == (0, 1)  # no background of its own
        fails(run("plot", tmp_path / "nowhere"), "is not the output of pldr train")
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
        fails(run("plot", tmp_path), "holds no loss to plot")
        good = '{"step": 1, "loss": 2.0}\n'
        (tmp_path / "log.jsonl").write_text(good + '{"step"')
        fails(run("plot", tmp_path), "line 2: not valid JSON")
        for line in ("5", '{"loss": 1}', '{"step": 1, "loss": "x"}', '{"step": 1, "G_variation": 3}', '{"step": [1]}',
                     '{"step": 1, "G_variation": [[1]]}', '{"step": 1, "G_rank": 1}', '{"step": 1, "row_gain": ["x"]}', '{"step": 1, "accuracy": "x"}', '{"step": 1, "dag_A_P": {}}',
                     '{"step": 1, "eval_accuracy": 1e999}'):  # fmt: skip
            (tmp_path / "log.jsonl").write_text(good + line)
            fails(run("plot", tmp_path), "line 2: not a line of a training log")
        (tmp_path / "log.jsonl").write_text(
            "".join(json.dumps({"step": 1, "G_variation": g}) + "\n" for g in ([1], [1, 2]))
        )
        fails(run("plot", tmp_path), "different numbers of layers")
        (tmp_path / "log.jsonl").write_text(good)
        assert run("plot", tmp_path, "--output", tmp_path / "new" / "c.png")[0] == 0
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.png"]


def test_wrong_usage_is_one_line_too(run):
    for arguments, message in (
        (["generate"], "Missing argument"),
        (["generate", "m", "p", "--top-p", "abc"], "Invalid value for '--top-p'"),
        (["generate", "m", "p", "--cache", "all"], "'all' is not one of 'kv+g', 'kv', 'g', 'none'"),
        (["generate", "m", "p", "--dtype", "int8"], "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
        (["convert", "m", "o", "--to", "gguf"], "'gguf' is not one of 'pldr', 'hub', 'reference'"),
        (["convert", "m", "o", "--rope", "spiral"], "'spiral' is not one of 'adjacent', 'halves'"),
        (["eval", "m", "--suite", "papers"], "Invalid value for '--suite'"),
        (["eval", "m", "--mode", "warm"], "'warm' is not one of 'frozen', 'cached', 'learned'"),
        (["serve", "--backend", "other"], "'other' is not one of 'auto', 'engine', 'vllm'"),
        (["compress", "m", "o", "--weighting", "some"], "'some' is not one of 'moments', 'none'"),
        (["reproduce", "gravity"], "'gravity' is not one of 'caching', 'fidelity'"),
        (["reproduce", "caching", "--size", "huge"], "'huge' is not one of 'tiny', 'small', 'paper'"),
        (["info", "m", "--nothing"], "No such option"),
        (["what"], "No such command 'what'"),
    ):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert message in err
    assert run()[0] == 2


def test_a_short_word_for_help(run):
    for arguments in (["-h"], ["generate", "-h"], ["tokenizer", "-h"], ["tokenizer", "train", "-h"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert "Usage: pldr" in out


def test_many_prompts_from_a_file(run, folder, tmp_path):
    prompts = ["the cat", "a mat\u2028and saw", "who ran to see him at her red house"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    code, out, _ = run("generate", folder, "--prompts-file", tmp_path / "prompts.txt", "--max-new-tokens", "6")
    assert code == 0
    lines = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        alone = json.loads(run("generate", folder, line["prompt"], "--max-new-tokens", "6", "--json")[1])
        assert (line["text"], line["token_ids"]) == (alone["text"], alone["token_ids"])
    for text, message in (
        ("", "prompts: there are none"),
        ("the cat\n" + "cat " * 70, "prompt 2: prompt: "),
    ):
        (tmp_path / "prompts.txt").write_text(text)
        fails(run("generate", folder, "--prompts-file", tmp_path / "prompts.txt"), message)
    (tmp_path / "prompts.txt").write_text("the cat")
    for option in (["--beams", "2"], ["--cache", "kv"]):
        fails(
            run("generate", folder, "--prompts-file", tmp_path / "prompts.txt", *option),
            "leave --cache and --beams out",
        )


def test_an_adapter_folder_says_whose_it_is(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/laptop"}')
    fails(run("info", tmp_path), "is an adapter alone, of runs/laptop; load that model, and the adapter with peft's")


def test_a_bug_is_one_line_with_a_way_to_its_traceback(run, folder, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("surprise")

    monkeypatch.setattr("pldr.checkpoints.info.model_facts", broken)
    fails(run("info", folder), "unexpected KeyError (PLDR_TRACEBACK=1 shows where)")
    monkeypatch.setenv("PLDR_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["pldr", "info", str(folder)])
    with pytest.raises(KeyError):
        main()


def test_reference_checkpoints_of_v52(run, tmp_path, toy_tokenizer):
    torch.manual_seed(0)
    config = PldrConfig(
        vocab_size=len(toy_tokenizer), hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        metric_learner_units=2, metric_learner_width=24, max_position_embeddings=64, rope_pairing="halves",
    )  # fmt: skip
    PldrForCausalLM(config).save_pretrained(tmp_path / "ours")
    toy_tokenizer.save_pretrained(tmp_path / "ours")
    run("convert", tmp_path / "ours", tmp_path / "reference", "--to", "reference")
    file = tmp_path / "reference" / "hyperparameters.py"
    file.write_text(file.read_text().replace("'reference_rope': False, ", ""))  # as the published framework writes it
    expected = run("generate", tmp_path / "ours", "the cat sat on a")
    assert run("generate", tmp_path / "reference", "the cat sat on a", "--rope", "halves") == expected
    assert run("generate", tmp_path / "reference", "the cat sat on a") != expected
    run("freeze", tmp_path / "reference", tmp_path / "frozen", "--prompt", "the cat", "--rope", "halves")
    assert load_model(tmp_path / "frozen").config.rope_pairing == "halves"


@pytest.mark.parametrize("to", ["pldr", "hub", "reference"])
def test_a_full_disk(run, tmp_path, to):
    """The system itself refuses to write more than 20 kB to a file."""
    assert max(file.stat().st_size for file in (FIXTURES / "v51-small" / "hub").iterdir()) > 20_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        result = run("convert", FIXTURES / "v51-small" / "hub", tmp_path / "out", "--to", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    fails(result, "could not be written")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_prompt(run, folder):
    fails(run("generate", folder), "say what text it should continue")


def test_training_flags_exclude_each_other(run):
    fails(run("train", "demo-cpu", "--resume", "--overwrite"), "choose one")


def test_tokenizer_train_and_merge(run, tmp_path):
    lines = [json.dumps({"text": " ".join(WORDS[i:] + WORDS[:i])}) for i in range(len(WORDS))] * 3
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "bad"]))
    out = tmp_path / "tokenizer"
    for model in ("unigram", "bpe"):
        code, shown, err = run("tokenizer", "train", tmp_path / "a.jsonl", "--output", out, "--vocab-size", "290",
                               "--model", model, "--overwrite")  # fmt: skip
        assert code == 0
        assert f"290 pieces ({model})" in shown
        assert "1 skipped: not JSON" in err
        assert len(pldr.load_tokenizer(out)) == 290
    fails(run("tokenizer", "train", tmp_path / "a.jsonl", "--output", out), "exists and is not empty")
    fails(run("tokenizer", "train", tmp_path / "a.jsonl", "--output", tmp_path / "b", "--strict"), "not JSON")
    assert not (tmp_path / "b").exists()
    fails(run("merge", tmp_path, tmp_path / "c"), "not a training checkpoint")
    fails(run("merge", pldr.STORIES, tmp_path / "c"), "this is a model folder, not a training checkpoint")
    few = run("tokenizer", "train", tmp_path / "a.jsonl", "--output", tmp_path / "b", "--vocab-size", "5")
    fails(few, "--vocab-size: 5 does not work for this text: Vocabulary size is smaller than required_chars")


def test_the_demo_trains_no_recipe_unasked(run, tmp_path):
    fails(run("demo", "--output", tmp_path / "d", "--recipe", "laptop"), "--recipe: says what train is to train")
    assert not (tmp_path / "d").exists()


def test_the_demo_replaces_only_its_own_folder(run, tmp_path):
    (tmp_path / "work" / "model").mkdir(parents=True)
    (tmp_path / "work" / "model" / "thesis.txt").write_text("years")
    fails(run("demo", "--output", tmp_path / "work"), "exists and is not empty")
    assert (tmp_path / "work" / "model" / "thesis.txt").read_text() == "years"
    # An earlier demo stays as it is when the next can not start.
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "demo.json").write_text('{"seconds": 80}')
    fails(run("demo", "--output", tmp_path / "old", "--train", "--recipe", "nosuch"), "no recipe of that name")
    assert (tmp_path / "old" / "demo.json").read_text() == '{"seconds": 80}'
    (tmp_path / "r.yaml").write_text("output: x\ndata: {train: [a.txt]}\n")
    fails(
        run("demo", "--output", tmp_path / "new", "--train", "--recipe", tmp_path / "r.yaml"),
        "the recipe needs data.validation",
    )
    assert not (tmp_path / "new").exists()
