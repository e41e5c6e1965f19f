"""Log-likelihoods against plain forwards, in every mode; the sliding window; perplexity in closed form."""

import copy
import itertools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import shared
from pldr import freeze, load_model, load_tokenizer, make_cache
from pldr.evaluation.modes import MODES, SEQUENTIAL
from pldr.evaluation.perplexity import evaluate_texts, perplexity, windows
from pldr.evaluation.processes import Processes
from pldr.evaluation.scoring import Scorer, make_scorers, mode_disagreement, read_calibration
from pldr.generation import generate_text
from pldr.models.shipped import STORIES

SCORED = (*MODES, SEQUENTIAL)


@pytest.fixture
def calibration(ids):
    return ids.flip(0)


@pytest.fixture
def pairs():
    """Contexts of several lengths, some with several continuations, some of one token."""
    generator = torch.Generator().manual_seed(1)

    def some(count):
        return torch.randint(4, 97, (count,), generator=generator).tolist()

    found = []
    for length in (1, 3, 7, 7, 7, 12, 3):
        context = some(length)
        found += [(context, some(size)) for size in (1, 5, 2)]
    return found


@torch.no_grad()
def plainly(model, context, continuation, mode):
    """The log-likelihood by one sequence at a time, token by token where G_LM is cached; summed in float64, as scores are."""
    if mode == "cached":
        cache = make_cache(model.config)
        logits = [model(torch.tensor([context]), past_key_values=cache).logits[0, -1]]
        for token in continuation[:-1]:
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
        logits = torch.stack(logits)
    elif mode == SEQUENTIAL:
        read = [[*context, *continuation[:place]] for place in range(len(continuation))]
        logits = torch.stack([model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in read])
    else:
        ids = torch.tensor([[*context, *continuation]])
        logits = model(ids[:, :-1], use_cache=False).logits[0, len(context) - 1 :]
    return logits.log_softmax(-1)[range(len(continuation)), continuation].double().sum().item()


def plain_model(model, mode, calibration):
    return freeze(copy.deepcopy(model), calibration) if mode == "frozen" else model


@pytest.mark.parametrize("mode", SCORED)
def test_scores_are_those_of_a_plain_forward(small_model, pairs, calibration, mode):
    model = small_model()
    scores = Scorer(model, mode, calibration=calibration).score(pairs)
    plain = plain_model(model, mode, calibration)
    expected = [plainly(plain, *pair, mode) for pair in pairs]
    assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=1e-5)


def test_the_modes_of_a_fresh_model_differ(small_model, pairs, calibration):
    """Else the test above could not tell them apart."""
    model = small_model()
    found = [[s.log_likelihood for s in Scorer(model, m, calibration=calibration).score(pairs)] for m in SCORED]
    for one, other in itertools.combinations(range(4), 2):
        assert max(abs(a - b) for a, b in zip(found[one], found[other], strict=True)) > 1e-3


@pytest.mark.parametrize("mode", SCORED)
@pytest.mark.parametrize("batch_size", [1, 2, 5, "auto"])
def test_neither_batch_size_nor_order_changes_a_score(small_model, pairs, calibration, mode, batch_size):
    scorer = Scorer(small_model(), mode, calibration=calibration, batch_size=batch_size)
    alone = [scorer.score([pair])[0].log_likelihood for pair in pairs]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = scorer.score([pairs[index] for index in order])
    found = {index: score.log_likelihood for index, score in zip(order, shuffled, strict=True)}
    assert [found[index] for index in range(len(pairs))] == pytest.approx(alone, abs=1e-5)


def test_a_frozen_operator_obeys_the_chain_rule_and_a_learned_one_leaks(small_model, calibration):
    """The log-likelihood of a text is the sum over its halves, unless G_LM has seen what comes later."""
    context, first, second = [5, 6, 7], [10, 11, 12], [20, 21, 22]
    gaps = {}
    for mode in ("frozen", "learned"):
        scorer = Scorer(small_model(), mode, calibration=calibration)
        whole, start, end = scorer.score([(context, first + second), (context, first), (context + first, second)])
        gaps[mode] = abs(whole.log_likelihood - start.log_likelihood - end.log_likelihood)
    assert gaps["frozen"] < 1e-5
    assert gaps["learned"] > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_greedy_continuations_are_known_as_such(small_model, calibration, mode):
    model = small_model()
    scorer = Scorer(model, mode, calibration=calibration)
    plain, context = plain_model(model, mode, calibration), [5, 6, 7]
    best = int(plain(torch.tensor([context])).logits[0, -1].argmax())
    assert scorer.score([(context, [best])])[0].is_greedy
    assert not scorer.score([(context, [(best + 1) % 97])])[0].is_greedy
    if mode == "frozen":  # in the other modes the tokens of a text are not judged one by one
        text = plain.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, eos_token_id=None)[
            0, 3:
        ].tolist()
        assert scorer.score([(context, text)])[0].is_greedy
        assert not scorer.score([(context, [*text[:-1], (text[-1] + 1) % 97])])[0].is_greedy


def test_a_shared_context_is_read_once(small_model, monkeypatch):
    model = small_model(operator="constant", operator_init="random")
    seen = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **rest: (
        seen.append(input_ids.numel()), forward(input_ids=input_ids, **rest))[1])  # fmt: skip
    Scorer(model, "frozen").score([([5] * 20, [6, 7]), ([5] * 20, [8, 9]), ([5] * 20, [10])])
    assert seen == [20, 3]  # the context, then all but the last tokens of its continuations, filled up


def test_of_a_long_context_the_last_tokens_count(small_model, calibration):
    model = small_model()
    long = torch.randint(4, 97, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    for mode in MODES:
        scorer = Scorer(model, mode, calibration=calibration)
        one, two = scorer.score([(long, [5, 6, 7]), (long[-62:], [5, 6, 7])])
        assert one == two
        assert scorer.truncated == 1


def test_what_can_not_be_scored_is_refused(small_model, calibration):
    model = small_model()
    constant = small_model(operator="constant", operator_init="identity")
    scorer = Scorer(model, "cached")
    for pairs, message in [
        ([([], [5])], "at least one token"),
        ([([5], [])], "at least one token"),
        ([([5], [6] * 65)], "65 tokens is longer than the context of 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            scorer.score(pairs)
    for arguments, message in [
        ((model, "melted"), "must be one of learned, cached, frozen, sequential, got 'melted'"),
        ((constant, "learned"), "needs a learned operator"),
        ((constant, "cached"), "needs a learned operator"),
        ((model, "frozen"), "no passages to freeze"),
    ]:
        with pytest.raises(ValueError, match=message):
            Scorer(*arguments)
    for size in (0, -1, "many", "1.5"):
        with pytest.raises(ValueError, match="positive number or auto"):
            Scorer(model, "cached", batch_size=size)


class TestPerplexity:
    @pytest.mark.parametrize(("count", "length", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (50, 8, 8), (21, 1, 1)])  # fmt: skip
    def test_a_window_scores_every_token_once(self, count, length, stride):
        ids = list(range(100, 100 + count))
        found = list(windows(ids, 3, length, stride))
        assert [token for _, part in found for token in part] == ids
        for number, (context, part) in enumerate(found):
            assert len(context) + len(part) - 1 <= length
            if number == 0:
                assert context == [3]
            else:
                assert len(context) == length + 1 - len(part)
                assert context[-1] == part[0] - 1  # it stands right before
        if stride == length:  # the harness's own windows
            utils = pytest.importorskip("lm_eval.utils")
            theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 3, length, 1))
            assert [(list(a), list(b)) for a, b in found] == [(list(a), list(b)) for a, b in theirs]

    def test_in_closed_form(self, small_model, toy_tokenizer):
        """A head of zeros gives every token the probability 1 / V."""
        model = small_model(vocab_size=len(toy_tokenizer), operator="constant", operator_init="random")
        model.lm_head.weight.data.zero_()
        model.lm_head.bias.data.zero_()
        text = "the cat sat on a mat\nand saw that dog, café\n"
        found = perplexity(Scorer(model, "frozen"), toy_tokenizer, text, length=8, stride=4)
        vocabulary = math.log(len(toy_tokenizer))
        tokens = len(toy_tokenizer(text, add_special_tokens=False)["input_ids"])
        assert found.tokens == tokens
        assert found.nats_per_token == pytest.approx(vocabulary, rel=1e-6)
        assert found.perplexity == pytest.approx(len(toy_tokenizer), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(tokens * vocabulary / math.log(2) / 45, rel=1e-6)  # é is two bytes
        assert found.words == 13  # eleven, and two ends of lines
        assert not found.is_lossless  # the tokenizer knows no ends of lines
        assert perplexity(Scorer(model, "frozen"), toy_tokenizer, "the cat sat").is_lossless
        assert found.word_perplexity == pytest.approx(math.exp(tokens * vocabulary / 13), rel=1e-5)

    def test_more_context_is_used(self, small_model, toy_tokenizer):
        """What a stride of one window loses against a short stride is the context at its beginning."""
        model, text = (
            small_model(vocab_size=len(toy_tokenizer), operator="constant", operator_init="random"),
            "a dog " * 60,
        )
        scorer = Scorer(model, "frozen")
        one, other = (perplexity(scorer, toy_tokenizer, text, length=8, stride=stride) for stride in (8, 2))
        assert one.tokens == other.tokens
        assert abs(one.nats_per_token - other.nats_per_token) > 1e-6

    def test_bad_windows_and_empty_texts_are_refused(self, small_model, toy_tokenizer):
        scorer = Scorer(
            small_model(vocab_size=len(toy_tokenizer), operator="constant", operator_init="random"), "frozen"
        )
        for settings, message in [({"length": 65}, "context of 64"), ({"length": 0}, "context of 64"),
                                  ({"stride": 0}, "window of 64"), ({"length": 8, "stride": 9}, "window of 8")]:  # fmt: skip
            with pytest.raises(ValueError, match=message):
                perplexity(scorer, toy_tokenizer, "the cat", **settings)
        with pytest.raises(ValueError, match="empty"):
            perplexity(scorer, toy_tokenizer, "")
        for text in ("", " \n"):
            with pytest.raises(ValueError, match=r"a\.txt: is empty"):
                evaluate_texts({"frozen": scorer}, toy_tokenizer, {"b.txt": "the cat", "a.txt": text})

    def test_words_beyond_a_float(self, small_model, toy_tokenizer):
        """A text without spaces is one word."""
        model = small_model(vocab_size=len(toy_tokenizer), operator="constant", operator_init="random")
        found = perplexity(Scorer(model, "frozen"), toy_tokenizer, "cat" * 300)
        assert (found.words, found.word_perplexity) == (1, None)
        assert math.isfinite(found.nats_per_token)

    def test_words_are_counted_as_in_wikitext(self):
        """The test set of WikiText-2 has 245,569 tokens, ends of lines among them."""
        text = shared("data/wikitext-2/test.txt").read_text(encoding="utf-8")
        assert len(text.split()) + text.count("\n") == 245_569


def test_modes_that_disagree_are_noticed(small_model, ids, stories):
    assert mode_disagreement(make_scorers(small_model(), ids), ids) > 1e-3
    model, tokenizer = stories
    rows = read_calibration(tokenizer, 64)
    assert mode_disagreement(make_scorers(model, rows), rows) < 1e-3
    assert list(make_scorers(small_model(operator="constant", operator_init="identity"))) == ["frozen"]


def piqa(tokenizer, count):
    """Context and both answers of each question, as token ids."""
    lines = shared("data/piqa/valid.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    pairs = []
    for question in map(json.loads, lines):
        context = f"Question: {question['goal']}\nAnswer:"
        start = tokenizer.encode(context, add_special_tokens=False)
        for answer in (question["sol1"], question["sol2"]):
            whole = tokenizer.encode(f"{context} {answer}", add_special_tokens=False)
            pairs.append((start, whole[len(start) :]))
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_fifty_real_questions(mode, stories):
    """The shipped model on PIQA, against forwards of one sequence at a time."""
    model, tokenizer = stories
    calibration = read_calibration(tokenizer, 512)
    pairs = piqa(tokenizer, 50)
    scores = Scorer(model, mode, calibration=calibration).score(pairs)
    plain = plain_model(model, mode, calibration)
    expected = [plainly(plain, *pair, mode) for pair in pairs]
    assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_scores_of_the_gpu_are_those_of_the_cpu(mode, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, tokenizer = load_model(STORIES), load_tokenizer(STORIES)
    rows = read_calibration(tokenizer, 128)
    pairs = [(row[:start], row[start : start + 20]) for row in rows.tolist() for start in (10, 40, 41, 90)]
    found = [Scorer(model.to(device), mode, calibration=rows).score(pairs) for device in ("cpu", "cuda")]
    values = [[score.log_likelihood for score in scores] for scores in found]
    assert values[1] == pytest.approx(values[0], abs=1e-3)


@pytest.mark.parametrize("scale", [1e38, -1e38])
def test_logits_that_are_not_finite_are_an_error(small_model, toy_tokenizer, scale):
    """Finite weights can give such logits; a score or a text of them would mean nothing."""
    model = small_model(vocab_size=290)
    model.lm_head.weight.data.fill_(scale)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        Scorer(model, "cached").score([([5, 6], [7])])
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        generate_text(model, toy_tokenizer, "the cat", max_new_tokens=2)


class Threads(Processes):
    """Processes that share an evaluation, as threads; `group` is a barrier and what each found."""

    def together(self, found):
        barrier, parts = self.group
        parts[self.rank] = found
        barrier.wait(60)
        return {key: value for part in parts.values() for key, value in part.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_share_batches_all_get_every_score(small_model, pairs, calibration, mode, count):
    """To the last bit, because batches stay what they are; and each does a part."""
    model, parts = small_model(), {}
    group = threading.Barrier(count), parts
    scorers = [
        Scorer(model, mode, calibration=calibration, batch_size=2, processes=Threads(rank, count, group))
        for rank in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        shared_out = list(pool.map(lambda scorer: scorer.score(pairs), scorers))
    alone = Scorer(model, mode, calibration=calibration, batch_size=2).score(pairs)
    assert shared_out == [alone] * count
    assert sum(map(len, parts.values())) == len(pairs)
    assert all(parts.values())
