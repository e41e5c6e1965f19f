"""transformers itself: its Auto classes, pipelines and ways to generate."""

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, QuantizedCache, pipeline
from transformers.utils import is_flash_attn_2_available

import pldr
from pldr import load_model, load_tokenizer, make_cache

PROMPT = "Once upon a time there was"


def greedy(model, ids, **settings):
    """The new tokens of one prompt."""
    return model.generate(torch.tensor([ids]), do_sample=False, eos_token_id=None, **settings)[0, len(ids) :].tolist()


def test_pipeline(row, operator, model_folder):
    row("transformers", "pipeline: text-generation", operator)
    folder = model_folder(operator)
    (answer,) = pipeline("text-generation", model=str(folder))(PROMPT, max_new_tokens=12, do_sample=False)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    # The pipeline decodes the new tokens alone, which loses the space before the first of them.
    assert answer["generated_text"] == PROMPT + tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(tokens) == 12


@pytest.mark.parametrize("operator", ["frozen", "factored"])
def test_continuous_batching(row, operator, model_folder):
    """Twenty prompts, more tokens than the context holds, one that is too long and one that runs into the context's end."""
    row("transformers", "generate_batch (continuous batching)", operator)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder(operator)), load_tokenizer(pldr.STORIES)
    text = "the king and the queen of the old town went to see a house by the sea and " * 20
    prompts = [tokenizer(text[3 * i :]).input_ids[: 60 + 4 * i] for i in range(20)]
    assert sum(map(len, prompts)) > 1024
    expected = [greedy(model, ids, max_new_tokens=8) for ids in prompts]
    last = tokenizer(text * 10).input_ids[:1020]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = list(
        model.generate_batch(
            [*prompts, [5] * 1024, last], config, continuous_batching_config=ContinuousBatchingConfig()
        ).values()
    )
    assert [result.generated_tokens for result in results[:20]] == expected
    assert "prompt of 1024 tokens leaves no room in the context length" in results[20].error
    assert results[21].error is None
    assert len(results[21].generated_tokens) == 4


def test_continuous_batching_of_a_learned_operator(row, model_folder):
    row(
        "transformers", "generate_batch (continuous batching)", "learned",
        refused="refused: a row of many requests has no G_LM of its own; freeze, or use `pldr.Engine`",
    )  # fmt: skip
    model = load_model(model_folder("learned"))
    with pytest.raises(
        ValueError, match=r"continuous batching: packs requests into one row.*pldr\.freeze.*pldr\.Engine"
    ):
        model.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=2))


def test_assisted_decoding_with_a_frozen_draft(row, operator, model_folder):
    """A frozen copy of the same model drafts; the answer is the model's own, whose G_LM is that of the prompt alone."""
    row("transformers", "assisted decoding, a frozen copy drafts", operator)
    model, draft = load_model(model_folder(operator)), load_model(model_folder("frozen"))
    tokenizer, calls = load_tokenizer(pldr.STORIES), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for text in (PROMPT, "The", "the king went to the sea and said to her"):
        ids = tokenizer(text).input_ids
        expected = greedy(model, ids, max_new_tokens=24)
        calls.clear()
        assert greedy(model, ids, max_new_tokens=24, assistant_model=draft) == expected
        assert len(calls) < 20 if operator != "factored" else calls
        assert greedy(model, ids, max_new_tokens=24, prompt_lookup_num_tokens=3) == expected


@pytest.mark.parametrize("operator", ["frozen", "factored"])
@pytest.mark.parametrize(
    ("backend", "settings", "most"),
    # The most that a logit may differ: as large as rounding to so many bits makes it; the logits have a standard deviation of 2.6.
    [
        ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}, 0.1),
        ("fp8", {}, 1.0),
    ],
)
def test_quantized_cache(row, operator, backend, settings, most, model_folder):
    """Keys and values of fewer bits: later tokens' logits are nearly those with a whole cache; `generate` takes them."""
    if backend == "hqq":
        pytest.importorskip("hqq")
    coarse = (backend, operator) == ("fp8", "factored")  # whose keys are of many sizes, and share one scale
    row("transformers", f"quantised KV-cache: {backend}", operator,
        refused="runs, with logits off by as much as they vary: use hqq" if coarse else "")  # fmt: skip
    model = load_model(model_folder(operator))
    ids = load_tokenizer(pldr.STORIES)(
        "Once upon a time there was a king who had a house by the sea", return_tensors="pt"
    ).input_ids
    logits = {}
    for name, cache in (
        ("whole", make_cache(model.config)),
        (backend, QuantizedCache(backend, model.config, **settings)),
    ):
        with torch.no_grad():
            model(ids[:, :-3], past_key_values=cache)
            logits[name] = torch.cat([model(ids[:, -i][:, None], past_key_values=cache).logits for i in (3, 2, 1)])
    difference = (logits[backend] - logits["whole"]).abs().max()
    assert most < difference < 4 if coarse else 0 < difference < most
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="quantized",
                            cache_config={"backend": backend} | settings)  # fmt: skip
    assert tokens.shape == (1, ids.shape[1] + 8)


def test_quantized_cache_of_a_learned_operator(row, model_folder):
    for backend in ("hqq", "fp8"):
        row(
            "transformers",
            f"quantised KV-cache: {backend}",
            "learned",
            refused="refused: it has no place for G_LM; freeze",
        )
    model = load_model(model_folder("learned"))
    for settings in ({}, {"cache_config": {"backend": "hqq"}}):
        with pytest.raises(ValueError, match=r"a learned G_LM has no place in a quantized cache; .*pldr\.freeze"):
            model.generate(torch.tensor([[5]]), max_new_tokens=2, cache_implementation="quantized", **settings)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="FlashAttention is installed")
def test_flash_attention_that_is_not_installed(row, operator, model_folder):
    row(
        "transformers",
        "attn_implementation: FlashAttention 2, 3",
        operator,
        refused="needs its package and a GPU; tried up to its kernels (`tests/test_flash.py`)",
    )
    for name, package in (("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")):
        with pytest.raises(Exception, match=f"attn_implementation='{name}' needs the package {package}"):
            AutoModelForCausalLM.from_pretrained(model_folder(operator), attn_implementation=name)
