"""The factored operator: keys of fewer dimensions, everywhere that a model goes."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from helpers import assert_close, fails
from pldr import (
    FactoredOperator,
    PldrConfig,
    PldrForCausalLM,
    convert_checkpoint,
    deductive_outputs,
    freeze,
    info,
    load_model,
    load_predefined_G,
    make_cache,
)
from pldr.operator import factor

RANKS = [8, 16]


def random_factors(ranks=RANKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, 16, rank, generator=generator) / 3 for _ in range(2)) for rank in ranks]


@pytest.fixture
def factored(small_model):
    """Two layers of two heads of 16 dimensions, with keys of 8 and 16."""
    return factor(small_model(), random_factors())


@pytest.fixture
def whole(small_model):
    """The same model with the products of its factors as constants."""
    return freeze(small_model(), G_LM=[left @ right.mT for left, right in random_factors()])


def continuation(model, ids, **settings):
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **settings)
    return tokens[:, ids.shape[1] :]


class TestModel:
    def test_queries_and_keys_have_the_rank_as_dimensions(self, factored):
        operator = factored.model.layers[0].self_attn.operator
        query, key = torch.randn(3, 2, 5, 16), torch.randn(3, 2, 5, 16)
        new_query, new_key, deductive = operator(query, key)
        assert new_query.shape == new_key.shape == (3, 2, 5, 8)
        assert_close(new_query @ new_key.mT, query @ deductive.G_LM @ key.mT, max_error=1e-5)
        assert_close(deductive.G_LM[0], random_factors()[0][0] @ random_factors()[0][1].mT, max_error=1e-6)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_equals_the_constant_operator_of_its_product(self, factored, whole, ids, attention):
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        for model in (factored, whole):
            model.set_attn_implementation(attention)
        with torch.no_grad():
            for given in (None, mask):
                one, other = (model(ids, attention_mask=given).logits for model in (factored, whole))
                assert_close(one[1:], other[1:], max_error=1e-5)
                assert_close(one[0, 5:], other[0, 5:], max_error=1e-5)
        outputs = deductive_outputs(factored, ids)
        assert_close(outputs.G_LM, deductive_outputs(whole, ids).G_LM, max_error=1e-6)
        assert outputs.A is outputs.A_LM is outputs.A_P is None

    def test_causal_to_the_bit(self, factored, ids):
        changed = ids.clone()
        changed[:, 10:] = (changed[:, 10:] + 7) % 97
        with torch.no_grad():
            assert torch.equal(factored(ids).logits[:, :10], factored(changed).logits[:, :10])

    @pytest.mark.slow
    def test_flex_attention(self, factored, whole, ids):
        factored.set_attn_implementation("flex_attention")
        with torch.no_grad():
            assert_close(factored(ids, use_cache=False).logits, whole(ids, use_cache=False).logits, max_error=1e-5)

    def test_fresh_models_are_initialised_as_told(self, small_model, ids):
        shape = {"operator": "factored", "operator_ranks": RANKS}
        G_LM = deductive_outputs(small_model(**shape), ids).G_LM[:, 0]
        eye = torch.eye(16)
        assert torch.equal(G_LM[1], eye.expand(2, 16, 16))
        assert torch.equal(G_LM[0], (eye * (torch.arange(16) < 8)).expand(2, 16, 16))
        drawn = deductive_outputs(small_model(**shape, operator_init="random"), ids).G_LM
        assert drawn.std(dim=(1, 2, 3, 4)).tolist() == pytest.approx([1, 1], abs=0.15)
        awaited = small_model(**shape, operator_init="external").model.layers[0].self_attn.operator
        assert awaited.left.isnan().all()
        assert awaited.right.isnan().all()

    def test_factors_that_are_trainable_are_trained(self, small_model, ids):
        fixed, trained = (factor(small_model(), random_factors(), trainable=flag) for flag in (False, True))
        assert trained.num_parameters() - fixed.num_parameters() == 2 * 2 * 16 * sum(RANKS)
        trained(ids, labels=ids).loss.backward()
        for layer in trained.model.layers:
            assert layer.self_attn.operator.left.grad.abs().sum() > 0
            assert layer.self_attn.operator.right.grad.abs().sum() > 0

    def test_a_factored_operator_can_be_exchanged_for_a_constant(self, factored, whole, ids):
        freeze(factored, G_LM=deductive_outputs(factored, ids).G_LM)
        assert factored.config.operator == "constant"
        assert factored.config.operator_ranks is None
        assert_close(factored(ids).logits, whole(ids).logits, max_error=1e-5)

    def test_leaves_the_configuration_of_others(self, small_config):
        config = small_config()
        model = factor(PldrForCausalLM(config), random_factors())
        assert config.operator == "learned"
        assert not any(getattr(module, "config", None) is config for module in model.modules())


class TestCaches:
    def test_keys_are_cached_in_the_rank_and_values_whole(self, factored, ids):
        for cache in (make_cache(factored.config), make_cache(factored.config, max_cache_len=24)):
            with torch.no_grad():
                factored(ids, past_key_values=cache)
            assert [layer.keys.shape[-1] for layer in cache.layers] == RANKS
            assert [layer.values.shape[-1] for layer in cache.layers] == [16, 16]
            assert {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer", "StaticLayer"}

    def test_prefill_and_decode_equal_one_forward(self, factored, ids):
        with torch.no_grad():
            expected = factored(ids, use_cache=False).logits
            for cache in (make_cache(factored.config), StaticCache(factored.config, 20)):
                steps = [factored(ids[:, :7], past_key_values=cache).logits]
                steps += [factored(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
                steps += [factored(ids[:, 12:], past_key_values=cache).logits]
                assert_close(torch.cat(steps, 1), expected, max_error=2e-5)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    )
    def test_generates_as_the_whole_operator(self, factored, whole, ids, settings):
        assert torch.equal(continuation(factored, ids, **settings), continuation(whole, ids, **settings))

    def test_padded_prompts_continue_as_unpadded_ones(self, factored, ids):
        padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), ids[:1, 6:]), 1)
        batch = torch.cat((padded, ids[1:]))
        mask = torch.ones_like(batch)
        mask[0, :6] = 0
        found = continuation(factored, batch, attention_mask=mask)
        assert torch.equal(found[:1], continuation(factored, ids[:1, 6:]))
        assert torch.equal(found[1:], continuation(factored, ids[1:]))

    @pytest.mark.slow
    def test_compiled_decoding_with_a_static_cache(self, factored, ids):
        found = continuation(factored, ids, cache_implementation="static")
        assert torch.equal(found, continuation(factored, ids))


class TestFiles:
    def test_saved_and_loaded(self, factored, ids, tmp_path):
        factored.save_pretrained(tmp_path)
        loaded = load_model(tmp_path)
        assert all(isinstance(layer.self_attn.operator, FactoredOperator) for layer in loaded.model.layers)
        assert loaded.config.operator_ranks == RANKS
        with torch.no_grad():
            expected = factored(ids).logits
            assert torch.equal(loaded(ids).logits, expected)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
        assert torch.equal(load_predefined_G(tmp_path), deductive_outputs(factored, ids).G_LM[:, 0])

    def test_trainable_factors_stay_trainable(self, small_model, tmp_path):
        factor(small_model(), random_factors(), trainable=True).save_pretrained(tmp_path)
        assert load_model(tmp_path).model.layers[0].self_attn.operator.right.requires_grad

    @pytest.mark.parametrize("layout", ["pldr", "hub", "reference"])
    def test_converted(self, factored, ids, tmp_path, layout):
        """Ours keeps the factors; the published layouts get their product as a predefined G_LM."""
        factored.save_pretrained(tmp_path / "model")
        convert_checkpoint(tmp_path / "model", tmp_path / "converted", to=layout)
        back = load_model(tmp_path / "converted")
        assert back.config.operator == ("factored" if layout == "pldr" else "constant")
        assert torch.equal(deductive_outputs(back, ids).G_LM, deductive_outputs(factored, ids).G_LM)

    def test_info(self, factored, tmp_path):
        facts = info(factored).to_json()
        assert facts["operators"] == {"factored": 2}
        assert facts["config"]["operator_ranks"] == RANKS
        assert facts["kv_cache_bytes_per_token"] == 2 * (8 + 16 + 2 * 16) * 4
        assert facts["g_cache_bytes_per_sequence"] == 0
        assert facts["constant_operator_values"] == 2 * 2 * 16 * sum(RANKS)
        assert facts["parameters_by_part"]["operator"] == 0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"operator_ranks": [16, 16]}, "2 mis-shaped"),
            ({"operator_ranks": [8]}, "one rank for each of 2 layers, got 1"),
            ({"operator_ranks": [8, 12]}, "multiples of 8, from 8 to head_dim=16, got 12"),
            ({"operator_ranks": [8, 0]}, "multiples of 8, from 8 to head_dim=16, got 0"),
            ({"operator_ranks": [8, 24]}, "multiples of 8, from 8 to head_dim=16, got 24"),
            ({"operator_ranks": [8, 8 << 60]}, "multiples of 8, from 8 to head_dim=16"),
            ({"operator_ranks": [8, "16"]}, "operator_ranks"),
            ({"operator_ranks": [8, True]}, "operator_ranks"),
            ({"operator_ranks": "816"}, "operator_ranks"),
            ({"operator_ranks": None}, "must be given for operator='factored', and for no other"),
            ({"operator": "constant"}, "must be given for operator='factored', and for no other"),
            ({"operator": "constant", "operator_ranks": None}, "missing"),
            ({"num_hidden_layers": 3, "operator_ranks": [8, 8, 8]}, "missing"),
            ({"num_hidden_layers": 4000, "operator_ranks": [8] * 4000}, "the configuration asks for"),
        ],
    )
    def test_a_configuration_that_lies_is_one_line(self, factored, tmp_path, run, fields, message):
        factored.save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        fails(run("info", str(tmp_path / "model")), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[:1], "one rank for each of 2 layers, got 1"),
        (lambda pairs: [(left[..., :4], right[..., :4]) for left, right in pairs], "multiples of 8"),
        (lambda pairs: [(left, right[..., :8]) for left, right in pairs[1:] * 2], "layer 0 has shapes"),
        (lambda pairs: [(left[:1], right[:1]) for left, right in pairs], "layer 0 has shapes"),
        (lambda pairs: [pairs[0], (pairs[1][0] / 0, pairs[1][1])], "layer 1 holds NaN or infinite"),
    ],
)
def test_unfit_factors_are_refused_and_nothing_changes(small_model, change, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        factor(model, change(random_factors()))
    assert model.config.operator == "learned"


def test_ranks_need_a_factored_operator():
    with pytest.raises(ValueError, match="for operator='factored', and for no other"):
        PldrConfig(operator="constant", operator_ranks=[8] * 5)
    with pytest.raises(ValueError, match="for operator='factored', and for no other"):
        PldrConfig(operator="factored")
    config = PldrConfig(operator="factored", operator_ranks=[8] * 5)
    assert copy.deepcopy(config).operator_ranks == [8] * 5
