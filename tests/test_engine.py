"""The engine: its steps against their references, its answers against the model's own, its batch against single prompts."""

import copy
import json
import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helpers import assert_close
from pldr import HELD_OUT, freeze, make_cache
from pldr.engine import Engine, Options
from pldr.engine.decoder import Decoder
from pldr.engine.text import GrowingText, continuation
from pldr.ops import decode
from pldr.ops.decoding import reference

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22, 23, 24, 25, 26], [11, 12, 13, 14, 15], [30, 31]]
OPERATORS = [
    {"operator": "learned"},
    {"operator": "constant", "operator_init": "random"},
    {"operator": "factored", "operator_init": "random", "operator_ranks": [8, 16], "hidden_size": 64},
    {"operator": "learned", "rope_pairing": "halves"},
]


@pytest.fixture(params=OPERATORS, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def model(request, small_model):
    """With every kind of operator. The head is spread, so that the most probable token is a clear one; exponents are
    positive, because near a pole of the power law rounding has no bound."""
    made = small_model(**request.param)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("exponent"):
                parameter.abs_()
        made.lm_head.weight.mul_(8)
    return made


def greedy(model, prompt, new):
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()


# --- against the model ----------------------------------------------------------------------------------------------


def test_log_probabilities_of_the_prompt_and_of_alternatives(model):
    """Of whoever asked, in a batch with others; those of a plain forward with the prompt's own G_LM."""
    engine = Engine(model, max_batch=5)
    asked = [
        Options(max_new_tokens=4, logprobs=True, top_logprobs=n, prompt_logprobs=bool(n), ignore_end=True)
        for n in range(5)
    ]
    requests = [engine.submit(prompt, options) for prompt, options in zip(PROMPTS, asked, strict=True)]
    while any(request.finish_reason is None for request in requests):
        engine.step(4)
    for most, request in enumerate(requests):
        found, prompt = engine.completion(request), request.prompt
        assert found.token_ids == greedy(model, prompt, 4)
        frozen = model if model.config.operator != "learned" else freeze(copy.deepcopy(model), torch.tensor([prompt]))
        with torch.no_grad():
            logprobs = frozen(torch.tensor([prompt + found.token_ids])).logits[0, :-1].log_softmax(-1)
        if not most:
            assert (found.top_logprobs, found.prompt_logprobs, found.prompt_top_logprobs) == (None, None, None)
            continue
        for place, top in enumerate(found.prompt_top_logprobs + found.top_logprobs):
            values, tokens = logprobs[place].topk(most)
            assert [token for token, _ in top] == tokens.tolist()
            assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
        chosen = logprobs.gather(1, torch.tensor(prompt + found.token_ids)[1:, None])[:, 0]
        assert found.prompt_logprobs + found.logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="logprobs: must be set for top_logprobs"):
        Options(top_logprobs=1)
    with pytest.raises(ValueError, match="top_logprobs: must be 0 or more"):
        Options(logprobs=True, top_logprobs=-1)


def test_every_path_gives_one_answer_along_forced_tokens(model):
    forced = torch.randint(4, 97, (3, 10), generator=torch.Generator().manual_seed(1))
    prompts = torch.randint(4, 97, (3, 6), generator=torch.Generator().manual_seed(2))
    cache = make_cache(model.config)
    with torch.no_grad():
        expected = [model(prompts, past_key_values=cache).logits[:, -1]]
        expected += [model(forced[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(10)]
    decoder = Decoder(model, 4, 64)
    found = [decoder.prefill(0, prompts.tolist())]
    decoder.state.positions[:3] += 1
    for i in range(10):
        decoder.state.tokens[:3] = forced[:, i]
        found.append(decoder.logits(3))
        decoder.state.positions[:3] += 1
    assert_close(torch.stack(found), torch.stack(expected), rms_ratio=1e-4)
    # Each of the batch alone, its prompt alone in a row of another number.
    single = Decoder(model, 2, 32)
    logits = [single.prefill(1, prompts[2:].tolist())[0]]
    assert_close(logits[0], expected[0][2], rms_ratio=1e-4)


def test_greedy_text_is_generates(model):
    results = Engine(model, max_batch=3).generate(PROMPTS, max_new_tokens=20, ignore_end=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == greedy(model, prompt, 20)
        assert result.finish_reason == "length"
        assert result.prompt_tokens == len(prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(small_model, dtype):
    model = small_model().to(dtype)
    found = Decoder(model, 1, 64).prefill(0, [PROMPTS[2]])
    expected = model(torch.tensor([PROMPTS[2]])).logits[:, -1]
    assert_close(found.double(), expected.double(), max_error=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_the_model_that_ships_with_pldr(stories):
    model, tokenizer = stories
    prompts = ["The old man looked out over the sea and", "Once upon a time", "A"]
    results = Engine(model, tokenizer).generate(prompts, max_new_tokens=24)
    for prompt, result in zip(prompts, results, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        expected = greedy(model, ids, 24)
        assert result.token_ids == expected
        assert result.text == continuation(tokenizer, ids, expected)


def test_logprobs_are_the_models(model):
    result = Engine(model).generate(PROMPTS[0], max_new_tokens=12, ignore_end=True, logprobs=True)[0]
    ids, cache = torch.tensor([PROMPTS[0] + result.token_ids]), make_cache(model.config)
    with torch.no_grad():
        logits = [model(ids[:, :5], past_key_values=cache).logits[:, -1:]]
        logits.append(model(ids[:, 5:], past_key_values=cache).logits[:, :-1])
    expected = torch.cat(logits, 1)[0].log_softmax(-1).gather(1, ids[0, 5:, None])[:, 0]
    assert_close(torch.tensor(result.logprobs), expected, max_error=1e-4)
    assert Engine(model).generate(PROMPTS[0], max_new_tokens=2)[0].logprobs is None


# --- drawing --------------------------------------------------------------------------------------------------------


def choices(rows, vocabulary=50, **fields):
    ones = torch.ones(rows)
    return reference.Choice(
        fields.get("uniform", torch.rand(rows)), ones * fields.get("temperature", 1.0),
        (ones * fields.get("top_k", 0)).int(), ones * fields.get("top_p", 1.0), ones * fields.get("penalty", 1.0),
        fields.get("seen"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "penalty": 1.4},
    ],
    ids=str,
)
def test_what_is_drawn_follows_transformers_distribution(settings):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 2
    seen = torch.zeros(1, 50, dtype=torch.uint8)
    seen[0, ::3] = 1
    processors = LogitsProcessorList()
    if "penalty" in settings:
        processors.append(RepetitionPenaltyLogitsProcessor(settings["penalty"]))
    processors.append(TemperatureLogitsWarper(settings.get("temperature", 1.0)))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    expected = processors(torch.arange(0, 50, 3)[None], logits.clone()).softmax(-1)[0]
    # A grid of places in the cumulated probabilities counts out the distribution.
    grid = 20_000
    uniform = (torch.arange(grid) + 0.5) / grid
    per_row = seen.expand(grid, -1).clone() if "penalty" in settings else None
    tokens, logprobs = reference.draw(logits.expand(grid, -1), choices(grid, uniform=uniform, seen=per_row, **settings))
    assert_close(torch.bincount(tokens, minlength=50) / grid, expected, max_error=2 / grid)
    assert_close(logprobs, logits[0].log_softmax(-1)[tokens], max_error=1e-5)
    if per_row is not None:
        assert (per_row.gather(1, tokens[:, None]) == 1).all()


def test_temperature_zero_is_the_most_probable_and_damage_is_told():
    logits = torch.randn(4, 50)
    tokens, _ = reference.draw(logits, choices(4, temperature=0.0))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    logits[1, 3], logits[2, 4] = math.nan, math.inf
    tokens, _ = reference.draw(logits, choices(4))
    assert tokens[1:3].tolist() == [-1, -1]
    assert tokens[0] >= 0 <= tokens[3]


def test_seeds_repeat_whatever_else_runs(model):
    settings = {"max_new_tokens": 12, "temperature": 1.2, "top_k": 30, "ignore_end": True}
    together = Engine(model, max_batch=2).generate(PROMPTS, seed=7, **settings)
    for index, (prompt, result) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = Engine(model).generate(prompt, seed=7 + index, **settings)[0]
        assert alone.token_ids == result.token_ids
    assert Engine(model).generate(PROMPTS[0], seed=8, **settings)[0].token_ids != together[0].token_ids
    torch.manual_seed(0)
    first = Engine(model).generate(PROMPTS[0], **settings)[0]
    torch.manual_seed(0)
    assert Engine(model).generate(PROMPTS[0], **settings)[0].token_ids == first.token_ids


def test_requests_of_several_kinds_share_a_batch(model):
    engine = Engine(model, max_batch=4)
    asked = [Options(max_new_tokens=9, ignore_end=True), Options(max_new_tokens=5, repetition_penalty=1.8, ignore_end=True),
             Options(max_new_tokens=7, temperature=0.9, seed=1, logprobs=True, ignore_end=True)]  # fmt: skip
    requests = [engine.submit(prompt, options) for prompt, options in zip(PROMPTS, asked, strict=False)]
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for prompt, options, request in zip(PROMPTS, asked, requests, strict=False):
        alone, found = Engine(model).generate(prompt, options)[0], engine.completion(request)
        assert found.token_ids == alone.token_ids
        assert (found.logprobs is None) == (alone.logprobs is None) == (not options.logprobs)
        if alone.logprobs is not None:
            assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert len(set(requests[1].token_ids)) == 5, "a large penalty repeats nothing"


def test_steps_that_were_begun_before_the_last_were_looked_at_change_nothing(model):
    asked = [Options(max_new_tokens=9, ignore_end=True), Options(max_new_tokens=3, temperature=1.5, seed=3, ignore_end=True),
             Options(max_new_tokens=6, repetition_penalty=1.8, ignore_end=True), Options(max_new_tokens=12, ignore_end=True),
             Options(max_new_tokens=4, top_logprobs=2, logprobs=True, ignore_end=True)]  # fmt: skip
    expected = [Engine(model).generate(prompt, options)[0] for prompt, options in zip(PROMPTS, asked, strict=True)]
    end = expected[0].token_ids[4]  # one that ends by a token which nobody could foresee
    asked[0] = Options(max_new_tokens=9, ignore_end=True, stop_ids=[end])
    expected[0] = Engine(model).generate(PROMPTS[0], asked[0])[0]
    engine = Engine(model, max_batch=4)
    engine.overlaps = True
    requests, begun, pairs = [], 0, list(zip(PROMPTS, asked, strict=True))
    while pairs or any(request.finish_reason is None for request in requests):
        requests += [engine.submit(*pairs.pop(0)) for _ in range(2) if pairs]
        engine.step()
        begun += engine._flight is not None
        if len(requests) > 3 and len(requests[3].token_ids) == 5:
            engine.cancel(requests[3])
    assert begun >= 2
    for request, alone in zip(requests, expected, strict=True):
        if request is not requests[3]:
            found = engine.completion(request)
            assert (found.token_ids, found.finish_reason) == (alone.token_ids, alone.finish_reason)
            assert found.top_logprobs is None or len(found.top_logprobs) == 4
    assert requests[3].finish_reason == "cancelled"
    assert requests[3].token_ids == expected[3].token_ids[:5]
    engine.step()
    assert engine._flight is None


def test_alternatives_of_a_batch_whose_size_is_rounded_up_for_graphs(model, monkeypatch):
    asked = {"max_new_tokens": 3, "logprobs": True, "top_logprobs": 2, "ignore_end": True}
    engine = Engine(model, max_batch=16)
    engine.decoder.graphs = True
    monkeypatch.setattr(engine.decoder, "_replay", lambda _, work: work())
    for found, alone in zip(engine.generate(PROMPTS, **asked), Engine(model).generate(PROMPTS, **asked), strict=True):
        assert found.token_ids == alone.token_ids
        assert [[token for token, _ in top] for top in found.top_logprobs] == [
            [token for token, _ in top] for top in alone.top_logprobs
        ]


def test_a_row_keeps_nothing_of_the_request_before(model):
    engine = Engine(model, max_batch=2)
    engine.generate(PROMPTS[:2], max_new_tokens=4, temperature=2.0, repetition_penalty=1.9, seed=1)
    plain = engine.submit(PROMPTS[0], Options(max_new_tokens=12, ignore_end=True))
    engine.step()
    engine.submit(PROMPTS[1], Options(max_new_tokens=12, temperature=2.0, seed=2, ignore_end=True))
    while plain.finish_reason is None:
        engine.step()
    assert plain.token_ids == greedy(model, PROMPTS[0], 12)


def test_a_stream_that_nobody_reads_is_no_request(stories):
    engine = Engine(*stories)
    engine.stream("The sea")
    assert not engine.waiting


def test_prompts_may_be_tensors(model):
    ids = torch.tensor(PROMPTS[0])
    (one,), two = (
        Engine(model).generate(ids, max_new_tokens=3),
        Engine(model).generate(ids.expand(2, -1), max_new_tokens=3),
    )
    assert [result.token_ids for result in two] == [one.token_ids] * 2


# --- ends -----------------------------------------------------------------------------------------------------------


def test_where_a_continuation_ends(small_model):
    model = small_model(operator="constant", operator_init="random")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    whole = greedy(model, PROMPTS[0], 20)
    engine = Engine(model)
    by_id = engine.generate(PROMPTS[0], max_new_tokens=20, stop_ids=[whole[4]], ignore_end=True)[0]
    assert (by_id.token_ids, by_id.finish_reason) == (whole[: whole.index(whole[4]) + 1], "stop")
    model.config.eos_token_id = whole[3]
    ended = Engine(model).generate(PROMPTS[0], max_new_tokens=20)[0]
    assert (ended.token_ids, ended.finish_reason) == (whole[: whole.index(whole[3]) + 1], "end")
    model.config.eos_token_id = 3


def test_a_stop_is_cut_out_of_the_text(stories):
    model, tokenizer = stories
    engine = Engine(model, tokenizer)
    whole = engine.generate("Once upon a time", max_new_tokens=40)[0].text
    stop = whole[20:26]
    cut = engine.generate("Once upon a time", max_new_tokens=40, stop=[stop, "no such text"])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]
    pieces = list(engine.stream("Once upon a time", max_new_tokens=40, stop=stop))
    assert "".join(piece.text for piece in pieces) == cut.text
    assert pieces[-1].completion.finish_reason == "stop"


def test_pieces_join_to_the_text(stories):
    model, tokenizer = stories
    engine = Engine(model, tokenizer, max_batch=2)
    prompts = ["Once upon a time", "The sea", "It was"]
    texts, completions = ["", "", ""], {}
    for piece in engine.stream(prompts, max_new_tokens=20, temperature=1.0, seed=3):
        texts[piece.index] += piece.text
        if piece.completion is not None:
            completions[piece.index] = piece.completion
    expected = engine.generate(prompts, max_new_tokens=20, temperature=1.0, seed=3)
    assert [completions[i] for i in range(3)] == expected
    assert texts == [result.text for result in expected]


def test_a_run_of_byte_tokens_is_shown_whole(toy_tokenizer):
    prompt = toy_tokenizer("the cat", add_special_tokens=False)["input_ids"]
    new = toy_tokenizer(" sat 日本 ☃ on", add_special_tokens=False)["input_ids"]
    growing, shown = GrowingText(toy_tokenizer, prompt), []
    for token in new:
        growing.add(token)
        shown.append(growing.piece(last=False))
    growing.end()
    shown.append(growing.piece(last=True))
    assert "".join(shown) == continuation(toy_tokenizer, prompt, new)
    assert "\ufffd" not in "".join(shown)


# --- weights of 8 bits ----------------------------------------------------------------------------------------------


def test_weights_of_8_bits_cost_little_loss(stories):
    """On a held-out text, by the engine's own reading; and a batch changes nothing for the one in it."""
    model, tokenizer = stories
    text = json.loads(HELD_OUT.read_text(encoding="utf-8").splitlines()[0])["text"]
    ids = tokenizer(text[:4000], add_special_tokens=False)["input_ids"][:300]
    targets = torch.tensor(ids[1:])

    def loss(quantize):
        logits = Decoder(model, 1, 512, quantize=quantize).read(0, ids)[:-1]
        return float(torch.nn.functional.cross_entropy(logits.double(), targets))

    whole, small = loss(None), loss("int8")
    assert small != whole
    assert abs(small - whole) < 0.02
    engine = Engine(model, tokenizer, max_batch=4, quantize="int8")
    prompts = ["Once upon a time", "The old man", "It was"]
    together = engine.generate(prompts, max_new_tokens=12)
    assert [engine.generate(prompt, max_new_tokens=12)[0].token_ids for prompt in prompts] == [
        result.token_ids for result in together
    ]


def test_what_can_not_be_quantised_is_refused(small_model):
    with pytest.raises(ValueError, match="quantize: must be int8"):
        Engine(small_model(), quantize="int4")
    with pytest.raises(ValueError, match="multiple of 32"):
        Engine(small_model(hidden_size=40, operator="constant"), quantize="int8")


# --- the batch ------------------------------------------------------------------------------------------------------


def test_a_caller_that_stops_reading_frees_its_places(stories):
    model, tokenizer = stories
    engine = Engine(model, tokenizer, max_batch=1)
    pieces = engine.stream(["Once", "The"], max_new_tokens=50)
    next(pieces)
    pieces.close()
    assert not engine.running
    assert not engine.waiting
    request = engine.submit("The sea", Options(max_new_tokens=3))
    cancelled = engine.submit("The sea", Options(max_new_tokens=30))
    engine.step()
    engine.cancel(cancelled)
    assert (request.finish_reason, cancelled.finish_reason) == (None, "cancelled")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cancelled_text_keeps_all_its_tokens(stories, streaming):
    model, tokenizer = stories
    engine = Engine(model, tokenizer)
    request = engine.submit("The sea", Options(max_new_tokens=30), streaming=streaming)
    engine.step()
    engine.step()
    engine.cancel(request)
    assert len(request.token_ids) >= 2
    assert engine.completion(request).text.strip() == tokenizer.decode(request.token_ids)


def test_logits_that_are_not_finite_end_their_own_request_alone(small_model):
    model = small_model(operator="constant", operator_init="random")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.inf
    engine = Engine(model)
    good, bad = engine.submit(PROMPTS[0], Options(max_new_tokens=4)), engine.submit([50, 51], Options(max_new_tokens=4))
    while good.finish_reason is None:
        engine.step()
    assert bad.finish_reason == "error"
    assert engine.completion(good).token_ids
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        engine.generate([[50]], max_new_tokens=2)
    assert not engine.running


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[]], {}, "prompt: is empty"),
        ([[97]], {}, "token 97 is none of the model's 97"),
        ([[5] * 64], {}, "leave no room"),
        ([[5]], {"max_new_tokens": 64}, "max_new_tokens: must be between 1 and 62"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ([[5]], {"temperature": 0.0}, "temperature: must be positive"),
        ([[5]], {"temperature": 1e-300}, "temperature: must be positive"),
        ([[5]], {"top_k": -1}, "top_k"),
        ([[5]], {"top_p": 1.1}, "top_p"),
        ([[5]], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[5]], {"repetition_penalty": 1e-300}, "repetition_penalty"),
        ([[5]], {"seed": -1}, "seed"),
        ([[5]], {"seed": 1.5}, "seed: must be an integer"),
        ([[5]], {"temperature": "1"}, "temperature: must be a number, got '1'"),
        ([[5]], {"top_p": "a"}, "top_p: must be a number, got 'a'"),
        ([[5]], {"repetition_penalty": None}, "repetition_penalty: must be between 1e-6 and 1e6, got None"),
        ([[5]], {"max_new_tokens": 1.5}, "max_new_tokens: must be an integer"),
        ([[5]], {"stop": [""]}, "stop: must be a text"),
        ([[5]], {"stop": None}, "stop: must be a text"),
        ([[5]], {"stop_ids": 5}, "stop_ids: must be a list"),
        ([["a"]], {}, "prompt: must be a text or token ids, got a list with str"),
        ([{"input_ids": [5]}], {}, "got dict"),
        ([[5]], {"stop": "x"}, "stop: texts need a tokenizer"),
        (["x"], {}, "prompts: texts need a tokenizer"),
    ],
)
def test_mistakes_are_told_before_any_work(small_model, prompts, settings, message):
    engine = Engine(small_model(operator="constant"))
    with pytest.raises(ValueError, match=message):
        engine.generate([[7, 8], *prompts], **settings)
    assert not engine.running
    assert not engine.waiting
    with pytest.raises(ValueError, match="max_batch"):
        Engine(small_model(), max_batch=0)
    with pytest.raises(ValueError, match="max_length"):
        Engine(small_model(), max_length=65)
    with pytest.raises(ValueError, match="graphs: are of CUDA, the model is on cpu"):
        Engine(small_model(), graphs=True)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.stream([[5]])


def test_nothing_to_continue(small_model):
    assert Engine(small_model()).generate([]) == []


def test_a_step_that_breaks_off_ends_its_requests_and_no_others(model, monkeypatch):
    engine = Engine(model, max_batch=2)
    running = engine.submit(PROMPTS[0], Options(max_new_tokens=9))
    engine.step()
    joining, waiting = (engine.submit(prompt, Options(max_new_tokens=3, ignore_end=True)) for prompt in PROMPTS[:2])
    begin = engine.decoder.begin

    def interrupted(*arguments, **fields):
        monkeypatch.setattr(engine.decoder, "begin", begin)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.decoder, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert (running.finish_reason, joining.finish_reason, waiting.finish_reason) == ("error", "error", None)
    with pytest.raises(RuntimeError, match="broken off"):
        engine.completion(joining)
    while waiting.finish_reason is None:
        engine.step()
    assert waiting.token_ids == greedy(model, PROMPTS[1], 3)
    with pytest.raises(ValueError, match="has not ended"):
        engine.completion(engine.submit(PROMPTS[0]))


def test_settings_at_their_ends_choose_the_most_probable(model):
    expected = greedy(model, PROMPTS[0], 6)
    for settings in ({"top_p": 1e-300}, {"top_k": 1}, {"temperature": 1e-6, "top_k": 2**40}):
        result = Engine(model).generate(PROMPTS[0], max_new_tokens=6, ignore_end=True, seed=3, **settings)[0]
        assert result.token_ids == expected, settings
        assert result.logprobs is None


def test_a_prompt_that_ends_inside_a_character(toy_tokenizer):
    ids = toy_tokenizer("the ☃", add_special_tokens=False)["input_ids"]
    assert continuation(toy_tokenizer, ids[:-1], ids[-1:]) == "☃"
    growing = GrowingText(toy_tokenizer, ids[:-1])
    growing.add(ids[-1])
    growing.end()
    assert growing.piece(last=True) == "☃"


def test_greedy_requests_leave_torchs_generator_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Engine(model).generate(PROMPTS[0], max_new_tokens=3)
    assert torch.rand(1) == expected


# --- kernels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """What kernels are to write is full of NaN before they do."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-77)

    monkeypatch.setattr(torch, "empty", lambda *sizes, **fields: poison(empty(*sizes, **fields)))
    monkeypatch.setattr(torch, "empty_like", lambda like, **fields: poison(empty_like(like, **fields)))


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to("cuda", dtype)


def layer(features, inputs, dtype):
    return reference.Linear(normal(features, inputs, dtype=dtype, scale=inputs**-0.5), normal(features, dtype=dtype))


def wide(linear):
    return reference.Linear(*(part.double() for part in linear))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 3, 4, 17, 33, 130])
@pytest.mark.parametrize(("width", "features"), [(40, 50), (896, 2688), (1100, 130)])
def test_products_with_what_goes_before_and_after(dtype, sequences, width, features, poisoned):
    x, residual = normal(sequences, width), normal(sequences, features)
    norm = reference.Norm(normal(width, dtype=dtype), normal(width, dtype=dtype), 1e-6)
    h = torch.nn.functional.layer_norm(x.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps)
    linear, both = layer(features, width, dtype), layer(2 * features, width, dtype)
    stream = decode.Stream(x)
    y, kept = decode.norm_linear(stream, norm, linear)
    assert relative(kept, h) < BOUND[dtype]
    assert relative(y, wide(linear)(h)) < BOUND[dtype]
    gated, _ = decode.norm_gated(stream, norm, both)
    assert relative(gated, reference.silu_product(wide(both)(h))) < 2 * BOUND[dtype]
    added = decode.linear_add(h.to(dtype), linear, residual).sum()
    assert relative(added, wide(linear)(h) + residual) < BOUND[dtype]
    # A sum in parts goes into the next norm as it stands.
    after = reference.Norm(normal(features, dtype=dtype), normal(features, dtype=dtype), 1e-6)
    following = decode.norm(decode.linear_add(h.to(dtype), linear, residual), after, torch.float32)
    assert relative(following, reference.norm((wide(linear)(h) + residual).float(), after)) < BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("pairing", ["adjacent", "halves"])
@pytest.mark.parametrize(
    ("dimensions", "rank", "kind"),
    [
        (32, 32, "constant"),
        (32, 32, "each"),
        (32, 8, "factored"),
        (32, 24, "factored"),
        (48, 48, "constant"),
        (20, 8, "factored"),
    ],
)
@pytest.mark.parametrize(
    ("sequences", "dtype"),
    [(1, torch.float32), (3, torch.float32), (5, torch.float32), (70, torch.float32),
     (3, torch.bfloat16), (5, torch.bfloat16), (40, torch.bfloat16), (100, torch.bfloat16), (130, torch.bfloat16)],
)  # fmt: skip
def test_attention_over_a_cache(pairing, dimensions, rank, kind, sequences, dtype, poisoned):
    rows, heads, length = sequences + 2, 3, 300
    qkv = normal(sequences, 3 * heads * dimensions, dtype=torch.float32 if sequences <= decode.FEW else dtype)
    keys, values = normal(rows, heads, length, rank, dtype=dtype), normal(rows, heads, length, dimensions, dtype=dtype)
    positions = torch.randint(
        length, (sequences,), dtype=torch.int32, generator=torch.Generator().manual_seed(4)
    ).cuda()
    positions[0] = {1: length - 1}.get(sequences, 0)
    rotary = normal(2, length + 5, dimensions // 2)
    left = normal(*((rows,) if kind == "each" else ()), heads, dimensions, rank, scale=rank**-0.5, dtype=dtype)
    right = normal(heads, dimensions, rank, dtype=dtype) if kind == "factored" else None
    expected_caches = keys.float(), values.float()
    factors = left.float(), None if right is None else right.float()
    expected = reference.attend(qkv.float(), *expected_caches, reference.places(positions, rotary), pairing, *factors)
    identity = reference.Linear(
        torch.eye(heads * dimensions, device="cuda", dtype=dtype),
        torch.zeros(heads * dimensions, device="cuda", dtype=dtype),
    )
    bound = {torch.float32: 2e-5, torch.bfloat16: 5e-3}[dtype]
    for _ in range(2):  # what the new token left in the cache changes nothing
        found = decode.attend(qkv, keys, values, decode.places(positions, rotary), pairing, left, right)
        found = decode.linear_add(found, identity, torch.zeros(sequences, heads * dimensions, device="cuda")).sum()
        assert relative(found, expected) < bound
    assert relative(keys, expected_caches[0]) < {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert relative(values, expected_caches[1]) < {torch.float32: 1e-9, torch.bfloat16: 5e-3}[dtype]


def state(rows, vocabulary, device, length=9):
    generator = torch.Generator().manual_seed(8)
    return reference.State(
        torch.zeros(rows, dtype=torch.int64, device=device), torch.arange(rows, dtype=torch.int32, device=device) % length,
        torch.zeros(rows, 4, dtype=torch.int64, device=device), torch.zeros(rows, 4, device=device),
        torch.zeros(rows, 24, device=device), torch.randn(vocabulary, 24, generator=generator).to(device), 3.0, length,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [97, 32000])
def test_tokens_chosen_on_the_device(vocabulary, poisoned):
    logits = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    logits[3, 5] = math.nan
    logits[4, 7] = math.inf
    logits[1, 60] = logits[1, 3] = 40.0  # a tie goes to the lower id
    seen = (torch.rand(8, vocabulary, generator=torch.Generator().manual_seed(2)) < 0.3).to(torch.uint8)
    choice = reference.Choice(
        torch.rand(8, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 0.5, 1, 1, 2, 1, 1, 1.0]),
        torch.tensor([0, 5, 0, 7, 0, 3000, 1, 0], dtype=torch.int32), torch.tensor([1, 1, 0.9, 0.5, 0.3, 1, 1, 1.0]),
        torch.tensor([1, 1, 2, 1, 1.5, 1, 1, 1.0]), seen,
    )  # fmt: skip
    here, there = state(8, vocabulary, "cpu"), state(8, vocabulary, "cuda")
    moved = reference.Choice(*(part.cuda() for part in choice))
    for column, chosen in enumerate((decode.choose_highest, decode.choose)):
        extra = (choice,) if chosen is decode.choose else ()
        chosen(logits, here, column, *extra)
        chosen(logits.cuda(), there, column, *((moved,) if extra else ()))
        for name in ("tokens", "positions", "chosen"):
            assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
        assert_close(there.x.cpu(), here.x, max_error=1e-6)
        assert_close(there.logprobs.cpu()[:3], here.logprobs[:3], max_error=1e-5)
    assert torch.equal(moved.seen.cpu()[:3], seen[:3])
    norm, head = (
        reference.Norm(torch.ones(24).cuda(), torch.zeros(24).cuda(), 1e-6),
        layer(vocabulary, 24, torch.float32),
    )
    x = normal(3, 24)
    decode.norm_highest(decode.Stream(x), norm, head, there, 2)
    assert there.chosen[:3, 2].tolist() == head(reference.norm(x, norm)).argmax(-1).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(("sequences", "vocabulary"), [(5, 97), (70, 97), (5, 32000), (128, 32000)])
def test_the_highest_logit_of_many_sequences(sequences, vocabulary, poisoned):
    norm = reference.Norm(normal(24, dtype=torch.bfloat16), normal(24, dtype=torch.bfloat16), 1e-6)
    head = layer(vocabulary, 24, torch.bfloat16)
    x = normal(sequences, 24)
    x[2, 5], x[4, 6] = math.nan, math.inf
    there = state(sequences, vocabulary, "cuda")
    decode.norm_highest(decode.Stream(x), norm, head, there, 2)
    expected = wide(head)(decode.norm(decode.Stream(x), norm, torch.bfloat16).double()).argmax(-1)
    expected[[2, 4]] = -1
    assert there.chosen[:, 2].tolist() == expected.tolist()
    head.bias[3] = -math.inf
    decode.norm_highest(decode.Stream(x), norm, head, there, 3)
    assert (there.chosen[:, 3] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "units", "glus", "width"), [(1, 1, 1, 32), (37, 3, 2, 64), (200, 2, 3, 16), (33, 2, 2, 128)]
)
def test_the_metric_learners_network(rows, units, glus, width, poisoned):
    dtype = torch.bfloat16
    u, many = normal(rows, width, dtype=dtype), (units, glus)
    gate_up = reference.Linear(normal(*many, 256, width, dtype=dtype, scale=0.2), normal(*many, 256, dtype=dtype))
    down = reference.Linear(normal(*many, width, 128, dtype=dtype, scale=0.1), normal(*many, width, dtype=dtype))
    norm = reference.Norm(normal(units, width, dtype=dtype), normal(units, width, dtype=dtype), 1e-6)
    expected = decode.residual_network(
        u.cpu().float(), *(reference.Linear(*(part.cpu().float() for part in w)) for w in (gate_up, down)),
        reference.Norm(norm.weight.cpu().float(), norm.bias.cpu().float(), 1e-6),
    )  # fmt: skip
    assert relative(decode.residual_network(u, gate_up, down, norm).cpu(), expected) < 1e-2 * units


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [1, 5])
def test_eager_graph_and_batch_on_the_gpu_are_the_model_on_the_cpu(model, sequences):
    prompts = torch.randint(4, 97, (sequences, 6), generator=torch.Generator().manual_seed(2))
    cache = make_cache(model.config)
    with torch.no_grad():
        logits = model(prompts, past_key_values=cache).logits[:, -1]
        tokens, expected = [], [logits]
        for _ in range(8):
            tokens.append(logits.argmax(-1))
            logits = model(tokens[-1][:, None], past_key_values=cache).logits[:, -1]
            expected.append(logits)
    on_device = copy.deepcopy(model).cuda()
    for graphs in (False, True):
        decoder = Decoder(on_device, 8, 64, graphs=graphs)
        assert_close(decoder.prefill(0, prompts.tolist()).cpu(), expected[0], max_error=2e-3)
        results = Engine(on_device, max_batch=4, graphs=graphs).generate(
            prompts.tolist(), max_new_tokens=8, ignore_end=True
        )
        assert [result.token_ids for result in results] == torch.stack(tokens, 1).tolist()
        drawn = Engine(on_device, graphs=graphs).generate(
            prompts.tolist(), max_new_tokens=8, ignore_end=True, logprobs=True
        )
        logprobs = torch.stack(expected[:8], 1).log_softmax(-1).gather(2, torch.stack(tokens, 1)[:, :, None])[..., 0]
        assert_close(torch.tensor([result.logprobs for result in drawn]), logprobs, max_error=5e-3)
        with_others = Engine(on_device, graphs=graphs).generate(
            prompts.tolist(), max_new_tokens=3, ignore_end=True, logprobs=True, top_logprobs=2
        )
        for result, alone in zip(with_others, results, strict=True):
            assert [top[0][0] for top in result.top_logprobs] == result.token_ids == alone.token_ids[:3]


@pytest.mark.gpu
def test_bfloat16_on_the_gpu_is_no_worse_than_plain_and_greedy_differs_at_ties_alone(stories):
    model, tokenizer = stories
    exact = freeze(
        copy.deepcopy(model), tokenizer("Once upon a time there was", return_tensors="pt")["input_ids"]
    ).cuda()
    plain = copy.deepcopy(exact).bfloat16()
    prompts = ["Once upon a time", "The old man", "It was", "She said that", "In the house of"]
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device="cuda")
        found = Engine(plain, tokenizer).generate(prompt, max_new_tokens=64, ignore_end=True)[0].token_ids
        other = plain.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
        if found == other:
            continue
        place = next(i for i, pair in enumerate(zip(found, other, strict=True)) if pair[0] != pair[1])
        with torch.no_grad():
            seen = torch.cat((ids, torch.tensor([found[:place]], device="cuda", dtype=torch.int64)), 1)
            true = exact(seen).logits[0, -1]
            rounding = (plain(seen).logits[0, -1].float() - true).abs().max()
        assert abs(true[found[place]] - true[other[place]]) <= 2 * rounding, (prompt, place)


def test_functions_of_a_step_name_the_same_arguments():
    """The kernels' entries, their plain references and what calls them."""
    import inspect

    for name in ("attend", "choose", "choose_highest", "embed", "places"):
        asked = list(inspect.signature(getattr(decode, name)).parameters)
        assert list(inspect.signature(getattr(reference, name)).parameters) == asked
