"""Statistics of the deductive outputs, each against an independent computation; and `pldr inspect`."""

import itertools
import json
import math
import re

import pytest
import torch

from helpers import FIXTURES, SENTENCE, assert_close, fails, shared
from pldr import certify, deductive_outputs, evaluate, freeze, inspect, load_model, load_tokenizer
from pldr.checkpoints.load import load_predefined_G
from pldr.data.rows import read_passages
from pldr.data.sources import Source
from pldr.deductive import numerical_rank, variation
from pldr.models.shipped import HELD_OUT
from pldr.study.order import continuations, distance, order_parameter
from pldr.study.page import report
from pldr.study.statistics import Scale, analyse_model, analyse_operator, summarise
from pldr.tables import number

NAMES = ("A", "A_LM", "A_P", "G_LM")


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(X):
    return X.double().square().mean().sqrt()


class TestStatistics:
    def test_determinants_in_closed_form(self):
        size = 16
        tiny = torch.full((size,), 10.0 ** (-223 / size))
        X = torch.stack([torch.diag(tiny), torch.diag(tiny * torch.tensor([-1.0] + [1.0] * (size - 1))),
                         torch.eye(size), torch.ones(size, size)])[None, None]  # fmt: skip
        statistics = summarise(X, "X")
        # A float32 entry is off by 6e-8, its sixteenth power by 16 · 6e-8 / ln 10 = 4e-7 in log10.
        assert statistics.log10_determinant[0, :3].tolist() == pytest.approx([-223.0, -223.0, 0.0], abs=1e-6)
        assert statistics.determinant_sign[0, :3].tolist() == [1.0, -1.0, 1.0]
        assert statistics.log10_determinant[0, 3] == -math.inf
        assert statistics.determinant_sign[0, 3] == 0.0

    def test_determinant_is_averaged_over_passages(self):
        X = torch.stack([torch.diag(torch.tensor([1.0, 10.0])), torch.diag(torch.tensor([-1.0, 1000.0]))])[
            None, :, None
        ]
        statistics = summarise(X, "X")
        assert statistics.log10_determinant.item() == pytest.approx(2.0)
        assert statistics.determinant_sign.item() == 0.0

    def test_singular_values_of_known_tensors(self):
        vector = torch.arange(1.0, 9.0)
        known = torch.tensor([2.0, 1.0, 0.5, 0.1, 0.019, 0.01, 1e-3, 1e-4])
        left = torch.linalg.qr(random_tensor(8, 8).double()).Q
        right = torch.linalg.qr(random_tensor(8, 8, seed=1).double()).Q
        X = torch.stack([torch.outer(vector, vector), (left * known) @ right, torch.zeros(8, 8)])[None, None]
        statistics = summarise(X, "X")
        assert statistics.rank[1e-2][0].tolist() == [1, 4, 0]
        assert statistics.rank[1e-3][0].tolist() == [1, 6, 0]
        assert_close(statistics.singular_values[0, 1], (known / 2).double(), max_error=1e-7)
        assert statistics.singular_values[0, 2].tolist() == [0.0] * 8
        # float32 entries of size 0.5 are off by 3e-8, beside a smallest singular value of 1e-4.
        assert statistics.condition[0, 1].item() == pytest.approx(2e4, rel=2e-3)
        assert statistics.condition[0, 0] > 1e14
        assert statistics.condition[0, 2] == math.inf
        assert summarise(torch.eye(4)[None, None, None], "X").condition.item() == 1.0

    def test_averages_and_extremes(self):
        X = random_tensor(2, 5, 3, 4, 4)
        statistics = summarise(X, "X")
        for layer, head in itertools.product(range(2), range(3)):
            values = X[layer, :, head].double()
            assert statistics.rms[layer, head].item() == pytest.approx(float(rms(values)), rel=1e-12)
            assert statistics.minimum[layer, head] == values.min()
            assert statistics.maximum[layer, head] == values.max()
            ranks = [float(numerical_rank(passage)) for passage in values]
            assert statistics.rank[1e-2][layer, head].item() == pytest.approx(sum(ranks) / 5)
            spectra = [torch.linalg.svdvals(passage) for passage in values]
            expected = sum(spectrum / spectrum[0] for spectrum in spectra) / 5
            assert_close(statistics.singular_values[layer, head], expected, max_error=1e-12)
            conditions = sorted(float(spectrum[0] / spectrum[-1]) for spectrum in spectra)
            assert statistics.condition[layer, head].item() == pytest.approx(conditions[2], rel=1e-9)

    def test_distance_between_heads(self):
        X = random_tensor(2, 3, 4, 5, 5)
        X[1, :, 1:] = X[1, :, :1]
        statistics = summarise(X, "X")
        pairs = []
        for passage, (first, second) in itertools.product(range(3), itertools.combinations(range(4), 2)):
            a, b = X[0, passage, first], X[0, passage, second]
            pairs.append(float(rms(a.double() - b.double()) / ((rms(a) ** 2 + rms(b) ** 2) / 2).sqrt()))
        assert statistics.head_distance[0].item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
        assert statistics.head_distance[1] == 0.0
        assert summarise(X[:, :, :1], "X").head_distance.isnan().all()

    def test_distance_between_passages(self):
        X = 3 + random_tensor(2, 5, 3, 4, 4)
        statistics = summarise(X, "X")
        assert_close(statistics.layer_variation, variation(X), max_error=1e-12)
        for layer, head in itertools.product(range(2), range(3)):
            values = X[layer, :, head].double()
            mean = sum(values) / 5
            expected = math.sqrt(sum(float(rms(value - mean) ** 2) for value in values) / 5) / float(rms(mean))
            assert statistics.variation[layer, head].item() == pytest.approx(expected, rel=1e-12)
        assert summarise(X[:, :1], "X").variation.isnan().all()
        assert (summarise(X[:, :1], "X", constant=True).variation == 0).all()

    def test_histogram_counts_every_value_where_the_scale_puts_it(self):
        X = random_tensor(2, 3, 2, 8, 8) ** 5
        statistics = summarise(X, "X")
        assert_close(statistics.histogram.sum(1), torch.ones(2, dtype=torch.float64), max_error=1e-12)
        count = statistics.histogram.shape[1]
        edges = torch.tensor([statistics.scale.value(2 * i / count - 1) for i in range(count + 1)])
        for layer, index in itertools.product(range(2), range(count)):
            inside = (X[layer].double() >= edges[index]) & (X[layer].double() < edges[index + 1])
            # A value right on an edge may fall on either side of it; the largest lies on the last edge.
            assert statistics.histogram[layer, index].item() == pytest.approx(
                inside.double().mean().item(), abs=1.1 / X[0].numel()
            )

    def test_scale(self):
        scale = Scale(bound=50.0, linear=0.5)
        assert scale.position(torch.tensor([-50.0, 0.0, 50.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])
        for value in (-20.0, 0.1, 7.0):
            assert scale.value(float(scale.position(torch.tensor(value)))) == pytest.approx(value)
        assert summarise(torch.zeros(1, 1, 1, 2, 2), "X").scale == Scale(1.0, 1e-3)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_named(self, value):
        X = random_tensor(3, 2, 4, 5, 5)
        X[1, 1, 2, 0, 3] = value
        with pytest.raises(ValueError, match="A_LM: layer 1, head 2 holds NaN or infinite values"):
            summarise(X, "A_LM")
        with pytest.raises(ValueError, match="G_LM: layer 1, head 2 holds NaN"):
            analyse_operator(X[:, 1])


class TestModel:
    def test_tensors_are_those_of_the_model(self, small_model, ids):
        """In batches that do not divide the number of passages."""
        model = small_model()
        analysis = analyse_model(model, ids, batch=2)
        outputs = deductive_outputs(model, ids)
        assert tuple(analysis.tensors) == NAMES
        assert (analysis.shape, analysis.passages, analysis.length) == ((2, 2, 16), 3, 16)
        for name in NAMES:
            X = getattr(outputs, name)
            # A matrix product of another batch size rounds differently.
            assert_close(analysis.tensors[name].example, X[:, 0], rms_ratio=1e-5, name=name)
            expected = X.double().square().mean((1, 3, 4)).sqrt()
            assert_close(analysis.tensors[name].rms, expected, rms_ratio=1e-5, name=name)

    @pytest.mark.parametrize(("length", "lengths"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (11, (1, 2, 4, 8, 11))])
    def test_growth_by_direct_forwards(self, small_model, ids, length, lengths):
        model = small_model()
        analysis = analyse_model(model, ids[:, :length], growth_passages=2)
        assert (analysis.lengths, analysis.growth_passages) == (lengths, 2)
        full = deductive_outputs(model, ids[:2, :length])
        for (index, n), name in itertools.product(enumerate(lengths), NAMES):
            shorter, whole = getattr(deductive_outputs(model, ids[:2, :n]), name), getattr(full, name)
            for layer in range(2):
                expected = float(rms(shorter[layer].double() - whole[layer].double()) / rms(whole[layer]))
                growth = analysis.tensors[name].growth[index, layer].item()
                assert growth == pytest.approx(expected, rel=1e-4, abs=1e-6), (name, n, layer)
        assert analyse_model(model, ids, growth_passages=0).lengths == ()

    def test_a_constant_operator_has_only_an_operator(self, small_model, ids):
        model = freeze(small_model(), ids[:1])
        analysis = analyse_model(model, ids)
        assert tuple(analysis.tensors) == ("G_LM",)
        statistics = analysis.tensors["G_LM"]
        expected = torch.stack([layer.self_attn.operator.G_LM for layer in model.model.layers])
        assert_close(statistics.example, expected, max_error=0.0)
        assert (statistics.variation == 0).all()
        assert (statistics.layer_variation == 0).all()
        assert analysis.lengths == ()
        assert "is a constant" in report(analysis, title="frozen")

    def test_values_that_are_not_finite_are_named(self, small_model, ids):
        model = small_model()
        with torch.no_grad():
            model.model.layers[1].self_attn.operator.energy_bias[1, 3, 3] = math.nan
        with pytest.raises(ValueError, match="G_LM: layer 1, head 1 holds NaN"):
            analyse_model(model, ids)

    def test_bfloat16(self, small_model, ids):
        assert analyse_model(small_model().bfloat16(), ids).tensors["A"].example.dtype == torch.float32

    @pytest.mark.parametrize("shape", [(0, 4), (2, 0), (4,)])
    def test_no_passages(self, small_model, shape):
        with pytest.raises(ValueError, match=r"passages: must be \[passages, tokens\]"):
            analyse_model(small_model(), torch.zeros(shape, dtype=torch.long))

    def test_json(self, small_model, ids):
        """Plain JSON, with null for what is infinite or does not exist."""
        fields = json.loads(json.dumps(analyse_model(small_model(), ids[:1]).to_json(), allow_nan=False))
        assert fields["tensors"]["G_LM"]["variation"] == [[None, None], [None, None]]
        assert len(fields["tensors"]["A"]["growth"]) == len(fields["growth_lengths"]) == 5
        assert set(fields["tensors"]["A_P"]["rank"]) == {"0.01", "0.001"}
        singular = analyse_operator(torch.zeros(1, 1, 4, 4)).to_json()["tensors"]["G_LM"]
        assert (singular["condition"], singular["log10_determinant"]) == ([[None]], [[None]])


def test_operator_of_the_published_model():
    analysis = analyse_operator(load_predefined_G(shared("data/G_LM-PLDRv51-110M-1.safetensors")))
    ranks = analysis.tensors["G_LM"].rank
    assert analysis.shape == (5, 14, 64)
    assert float(ranks[1e-2].mean()) == pytest.approx(14.84, abs=0.005)
    assert float(ranks[1e-3].mean()) == pytest.approx(18.47, abs=0.005)


def test_operator_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"G_LM: must be \[layers, heads, head_dim, head_dim\], got \(2, 3, 4, 5\)"):
        analyse_operator(torch.ones(2, 3, 4, 5))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (math.nan, "-"),
        (-math.inf, "-inf"),
        (4.53e-6, "4.5e-6"),
        (1e10, "1.0e10"),
        (0.25, "0.25"),
        (226.4, "226"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{SENTENCE} {n}." for n in range(60)))
    return file


class TestCommand:
    def test_json_is_the_analysis(self, run, folder, text):
        code, out, err = run("inspect", folder, text, "--passages", 5, "--length", 24, "--json")
        assert (code, err) == (0, "")
        fields = json.loads(out)
        passages = read_passages(Source([str(text)]), load_tokenizer(folder), 24, 5)
        expected = analyse_model(load_model(folder), passages).to_json()
        about = {"model": str(folder), "source": str(text)}
        assert fields == expected | about

    def test_table(self, run, folder, text, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = run("inspect", folder, text, "--passages", 3)
        assert code == 0
        assert "3 passages of 64 tokens: " in out  # the model's context
        lines = [line.rstrip() for line in out.splitlines()]
        for name in NAMES:
            start = lines.index(name)
            assert lines[start + 1].split()[0] == "layer"
            assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["0", "1"]
            assert all(len(line) <= 80 and "…" not in line for line in lines[start : start + 4])

    def test_without_data_the_excerpts_that_ship_with_pldr(self, run, folder):
        code, out, _ = run("inspect", folder, "--passages", 2, "--length", 8, "--json")
        fields = json.loads(out)
        assert code == 0
        assert fields["source"] == "held-out excerpts that ship with pldr"
        passages = read_passages(Source([str(HELD_OUT)]), load_tokenizer(folder), 8, 2)
        expected = analyse_model(load_model(folder), passages).tensors["A_LM"].rms.tolist()
        assert fields["tensors"]["A_LM"]["rms"] == expected
        assert "held-out excerpts" in run("inspect", folder, "--passages", 2, "--length", 8)[1]

    def test_report_is_whole_in_itself(self, run, folder, text, tmp_path):
        file = tmp_path / "reports" / "report.html"
        code, out, _ = run("inspect", folder, text, "--passages", 3, "--html", file)
        assert code == 0
        assert f"report: {file}" in out
        assert [path.name for path in file.parent.iterdir()] == ["report.html"]
        html = file.read_text(encoding="utf-8")
        links = re.findall(r'(?:src|href|srcset|url)\s*[=(]\s*["\']?([^"\'\s)>]+)', html)
        assert links
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
        assert "://" not in html
        assert "<script" not in html
        assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in html
        assert "prefers-color-scheme: dark" in html
        # Every link within the page has its target; one image a layer of each tensor.
        assert set(re.findall(r'href="#(\w+)"', html)) == set(re.findall(r'<h2 id="(\w+)"', html))
        assert html.count("<img ") == 4 * 2

    def test_report_escapes_names(self, small_model, ids):
        html = report(analyse_model(small_model(), ids), title='<b>&{{ 7 }}"', source="<i>.txt")
        assert "<b>" not in html
        assert "<i>.txt" not in html
        assert html.count("Deductive outputs of &lt;b&gt;&amp;{{ 7 }}&#34;<") == 2

    def test_pictures_hold_the_tensor(self, small_model, ids, tmp_path):
        """The first picture of the report, decoded by another library: A of layer 0."""
        import base64
        import io

        from matplotlib import pyplot

        analysis = analyse_model(small_model(), ids)
        html = report(analysis, title="model")
        image = pyplot.imread(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))  # [D, width, RGBA]
        statistics = analysis.tensors["A"]
        dim, step = 16, image.shape[1] // 2
        for head in range(2):
            part = torch.tensor(image[:, head * step : head * step + dim]).double()
            sign = torch.where(part[..., 0] > part[..., 2], 1.0, -1.0)
            # 127 steps of opacity either way, kept in 255.
            expected = statistics.scale.position(statistics.example[0, head])
            assert_close(sign * part[..., 3], expected, max_error=0.5 / 127 + 0.5 / 255 + 1e-6)

    def test_tensor_file(self, run, tmp_path):
        from safetensors.torch import save_file

        file = tmp_path / "G.safetensors"
        G_LM = random_tensor(2, 3, 8, 8)
        save_file({"G_LM": G_LM}, file)
        code, out, _ = run("inspect", file, "--json")
        assert code == 0
        expected = torch.linalg.slogdet(G_LM.double()).logabsdet / math.log(10)
        actual = json.loads(out)["tensors"]["G_LM"]["log10_determinant"]
        assert_close(torch.tensor(actual, dtype=torch.float64), expected, max_error=1e-9)
        fails(run("inspect", file, "text.txt"), "holds a tensor alone: no data")
        fails(run("inspect", file, "--rope", "halves"), "no options but html")
        fails(run("inspect", file, "--text-column", "x"), "no options but html")
        G_LM[1, 2, 0, 0] = math.nan
        save_file({"G_LM": G_LM}, file)
        fails(run("inspect", file), "G_LM: layer 1, head 2 holds NaN or infinite values")

    def test_frozen_model(self, run, folder, tmp_path, text):
        assert run("freeze", folder, tmp_path / "frozen", "--prompt", "the cat sat")[0] == 0
        code, out, _ = run("inspect", tmp_path / "frozen", text, "--json", "--html", tmp_path / "frozen.html")
        assert code == 0
        assert list(json.loads(out)["tensors"]) == ["G_LM"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--length", "65"], "length: must be between 1 and the context of 64, got 65"),
            (["--length", "0"], "length: must be between 1"),
            (["--passages", "0"], "passages: must be at least 1, got 0"),
            (["--passages", "9999"], "passages of 64 tokens, 9999 are asked for"),
            (["--text-column", "story", "--device", "warp"], "device: warp can not be used here"),
            (["--html", "."], "html: . is a folder; name a file"),
        ],
    )
    def test_bad_options(self, run, folder, text, arguments, message):
        fails(run("inspect", folder, text, *arguments), message)

    def test_bad_input(self, run, folder, tmp_path):
        empty = tmp_path / "empty.txt"
        empty.touch()
        fails(run("inspect", folder, empty), "less than one sequence of 64 tokens")
        fails(run("inspect", folder, tmp_path / "none.txt"), "matches no file")
        fails(run("inspect", tmp_path / "nowhere"), "no such model folder")
        fails(run("inspect", tmp_path / "no.safetensors"), "no.safetensors: no such file or folder")
        fails(run("inspect", FIXTURES / "v51-small", "--tokenizer", folder), "the model has vocab_size=97")


def test_a_model_stays_in_training(folder, text, toy_tokenizer):
    model, options = load_model(folder).train(), {"tokenizer": toy_tokenizer}
    inspect(model, text, passages=2, length=16, **options)
    certify(model, text, passages=2, calibration=1, length=16, **options)
    evaluate(model, text, window=16, **options)
    assert all(module.training for module in model.modules())


def test_data_may_be_one_name_or_several_texts_or_paths(folder, text, toy_tokenizer):
    """Of every function that takes data; and a model in memory is not named after the current folder."""
    model, settings = load_model(folder), {"passages": 2, "length": 16}
    found = [
        inspect(model, data, tokenizer=toy_tokenizer, **settings) for data in (str(text), text, [str(text)], [text])
    ]
    assert len({analysis.source for analysis in found}) == 1
    assert found[0].model == str(folder)
    assert len(repr(found[0])) < 200
    made = type(model)(type(model.config)(**{**model.config.to_diff_dict(), "name_or_path": ""}))
    assert inspect(made, text, tokenizer=toy_tokenizer, **settings).model == "model"
    for data in (str(text), text, [text]):
        assert list(evaluate(model, data, tokenizer=toy_tokenizer, window=16, calibration=data).texts) == [str(text)]


def test_an_analysis_is_short_in_a_notebook():
    analysis = analyse_operator(torch.randn(3, 2, 8, 8))
    assert len(repr(analysis)) + len(repr(analysis.tensors["G_LM"])) < 300
    assert len(repr(analysis.tensors)) < 300
    assert analysis._repr_html_().count("data:image/png;base64,") == 3


class TestOrderParameter:
    def test_distance_by_hand(self):
        """Layer 0: squares of the difference 4, of the tensors 1 and 9, all means: √(2 · 4 / 10). Layer 1: the same. Layer 2: √2."""
        one = torch.stack([torch.full((2, 1, 2, 2), value) for value in (1.0, 5.0, 2.0)])
        other = torch.stack([torch.full((2, 1, 2, 2), value) for value in (3.0, 5.0, 0.0)])
        assert distance(one, other).tolist() == pytest.approx([math.sqrt(0.8), 0.0, math.sqrt(2)])
        assert distance(other, one).tolist() == pytest.approx(distance(one, other).tolist())

    def test_is_of_two_continuations_of_a_prompt(self, small_model, ids):
        model, prompts = small_model(), ids[:, :4].repeat(2, 1)  # more than one batch
        found = order_parameter(model, prompts, 8)
        one, other = ([continuations(model, few, 8, seed=seed) for few in prompts.split(4)] for seed in (0, 1))
        assert all(text.shape[1] == 12 for text in one)
        assert torch.equal(torch.cat(one)[:, :4], prompts)
        assert not torch.equal(torch.cat(one), torch.cat(other))
        for name in NAMES:
            X, Y = (getattr(deductive_outputs(model, torch.cat(texts)), name).double() for texts in (one, other))
            want = [math.sqrt(2) * rms(X[i] - Y[i]) / (rms(X[i]) ** 2 + rms(Y[i]) ** 2).sqrt() for i in range(2)]
            assert found[name].tolist() == pytest.approx([float(value) for value in want], rel=1e-4)
            assert min(want) > 1e-3  # of an untrained model

    def test_of_a_constant_operator_is_zero(self, small_model, ids):
        assert order_parameter(small_model(operator="constant"), ids, 2) == {"G_LM": pytest.approx([0.0, 0.0])}

    def test_inspect_shows_it_where_it_is_asked_for(self, folder, run):
        code, out, _ = run("inspect", folder, "--order-parameter", "--passages", "2", "--length", "16")
        assert (code, "order parameter" in out) == (0, True)
        code, out, _ = run("inspect", folder, "--order-parameter", "--passages", "2", "--length", "16", "--json")
        order = json.loads(out)["order_parameter"]
        assert set(order) == set(NAMES)
        assert all(len(values) == 2 for values in order.values())
        assert (
            json.loads(run("inspect", folder, "--passages", "2", "--length", "16", "--json")[1])["order_parameter"]
            == {}
        )
