"""Every decode path gives one answer; what a learned operator sees decides what it does not."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers import assert_close
from pldr import deductive_outputs, freeze, make_cache
from pldr.cache import DynamicPlgaLayer, OperatorOnlyLayer, StaticPlgaLayer
from pldr.generation import CACHE_MODES

MODES = list(CACHE_MODES.values())


def continuation(model, ids, **settings):
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **settings)
    return tokens[:, ids.shape[1] :]


@pytest.fixture
def frozen_model(small_model, ids):
    return freeze(small_model(), ids[:1])


class TestModes:
    def test_each_mode_is_the_forced_forward_that_it_stands_for(self, small_model, ids):
        """Step by step along one forced sequence: the logits that the published semantics prescribe."""
        model, prompt, rest = small_model(), ids[:1, :9], ids[:1, 9:]
        with torch.no_grad():
            of_prompt = freeze(small_model(), prompt)
            for kv, g in MODES:
                cache = make_cache(model.config, kv=kv, g=g)
                model(prompt, past_key_values=cache, use_cache=kv)
                for step in range(rest.shape[1]):
                    seen = ids[:1, : 10 + step]
                    new = rest[:, step : step + 1] if kv else seen
                    logits = model(new, past_key_values=cache, use_cache=kv).logits[:, -1]
                    # Kept from the prompt in every mode but one, which computes G_LM anew over the whole sequence.
                    expected = (of_prompt if kv or g else model)(seen, use_cache=False).logits[:, -1]
                    assert_close(logits, expected, max_error=2e-5, name=f"kv={kv} g={g} step {step}")

    def test_what_is_kept(self, small_model, ids):
        model = small_model()
        outputs = deductive_outputs(model, ids)
        for kv, g, layer_class, expected in [
            (True, True, DynamicPlgaLayer, outputs.G_LM),
            (True, False, DynamicPlgaLayer, outputs.A),
            (False, True, OperatorOnlyLayer, outputs.G_LM),
        ]:
            cache = model(ids, use_cache=kv, use_g_cache=g).past_key_values
            assert [type(layer) for layer in cache.layers] == [layer_class] * 2
            assert cache.get_seq_length() == (16 if kv else 0)
            for layer, value in zip(cache.layers, expected, strict=True):
                assert torch.equal(layer.operator_state, value)
        assert model(ids, use_cache=False).past_key_values is None
        assert model(ids, use_cache=False, use_g_cache=False).past_key_values is None

    def test_constant_operator_uses_the_librarys_layers(self, frozen_model, ids):
        cache = frozen_model(ids, use_cache=True).past_key_values
        assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 2
        assert make_cache(frozen_model.config, kv=False, g=True) is None
        expected = continuation(frozen_model, ids)
        for kv, g in MODES:
            assert torch.equal(continuation(frozen_model, ids, use_cache=kv, use_g_cache=g), expected)

    def test_a_cache_without_a_place_for_G_is_refused(self, small_model, ids):
        with pytest.raises(ValueError, match=r"no place for G_LM; make it with pldr\.make_cache"):
            small_model()(ids, past_key_values=DynamicCache())

    def test_settings_that_contradict_are_refused(self, small_model, ids):
        model = small_model()
        with pytest.raises(ValueError, match="max_cache_len applies to a KV-cache"):
            make_cache(model.config, kv=False, max_cache_len=20)
        with pytest.raises(ValueError, match="the given past_key_values decides"):
            continuation(model, ids, past_key_values=make_cache(model.config), use_g_cache=False)
        with pytest.raises(ValueError, match="a learned G_LM needs the whole prompt at once"):
            continuation(model, ids, prefill_chunk_size=4)


class TestCausality:
    def test_constant_operator_is_causal_to_the_bit(self, frozen_model, ids):
        changed = ids.clone()
        changed[:, 10:] = (changed[:, 10:] + 7) % 97
        with torch.no_grad():
            one, other = frozen_model(ids).logits, frozen_model(changed).logits
        assert torch.equal(one[:, :10], other[:, :10])
        assert not torch.equal(one[:, 10:], other[:, 10:])

    def test_learned_operator_is_not(self, small_model, ids):
        """G_LM sums over later tokens as well, so that they change the logits of earlier ones."""
        model, changed = small_model(), ids.clone()
        changed[:, 10:] = (changed[:, 10:] + 7) % 97
        with torch.no_grad():
            difference = (model(ids).logits - model(changed).logits)[:, :10].abs().max()
        assert difference > 1e-4

    def test_prefill_and_decode_equal_one_forward_with_constant_G(self, frozen_model, ids):
        with torch.no_grad():
            expected = frozen_model(ids, use_cache=False).logits
            cache = make_cache(frozen_model.config)
            steps = [frozen_model(ids[:, :7], past_key_values=cache).logits]
            steps += [frozen_model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
            steps += [frozen_model(ids[:, 12:], past_key_values=cache).logits]  # several tokens at once
        assert_close(torch.cat(steps, 1), expected, max_error=2e-5)

    def test_prefill_and_decode_do_not_with_learned_G(self, small_model, ids):
        model = small_model()
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            cache = make_cache(model.config)
            logits = torch.cat(
                [model(ids[:, :7], past_key_values=cache).logits, model(ids[:, 7:], past_key_values=cache).logits], 1
            )
        assert (logits - expected).abs().max() > 1e-4


class TestPadding:
    @pytest.mark.parametrize(("kv", "g"), MODES)
    def test_left_padded_and_unpadded_prompts_continue_alike(self, small_model, ids, kv, g):
        model = small_model()
        prompts = [ids[0, :5], ids[1], ids[2, :11]]
        batch, mask = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            batch[row, 16 - len(prompt) :] = prompt
            mask[row, 16 - len(prompt) :] = 1
        together = continuation(model, batch, attention_mask=mask, use_cache=kv, use_g_cache=g)
        for row, prompt in enumerate(prompts):
            alone = continuation(model, prompt[None], use_cache=kv, use_g_cache=g)
            assert torch.equal(together[row : row + 1], alone)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_enters_neither_G_nor_attention(self, small_model, ids, side):
        """In a plain forward too, where nobody hands over position ids."""
        model = small_model()
        pad, ones = torch.full((3, 4), 9), torch.ones_like(ids)
        parts = lambda x, y: torch.cat((x, y) if side == "left" else (y, x), 1)  # noqa: E731
        batch, mask = parts(pad, ids), parts(torch.zeros_like(pad), ones)
        with torch.no_grad():
            expected, padded = model(ids).logits, model(batch, attention_mask=mask).logits
            outputs = deductive_outputs(model, batch, mask)
        kept = padded[:, 4:] if side == "left" else padded[:, :16]
        assert_close(kept, expected, max_error=1e-5)
        assert_close(outputs.G_LM, deductive_outputs(model, ids).G_LM, rms_ratio=1e-5)


class TestBatches:
    def test_beam_reordering_carries_G_along(self, small_model, ids):
        """The beams of different prompts keep their own prompt's G_LM."""
        model = small_model()
        settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "eos_token_id": None}
        together = model.generate(ids, **settings)
        for row in range(3):
            assert torch.equal(together[row : row + 1], model.generate(ids[row : row + 1], **settings))

    @pytest.mark.parametrize(("kv", "g"), [(True, True), (True, False), (False, True)])
    def test_batch_operations(self, small_model, ids, kv, g):
        model = small_model()
        cache = make_cache(model.config, kv=kv, g=g)
        model(ids, past_key_values=cache, use_cache=kv)
        state = cache.layers[1].operator_state.clone()
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert torch.equal(cache.layers[1].operator_state, state[[2, 0, 1]])
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[1].operator_state, state[[2, 2, 0, 0, 1, 1]])
        cache.batch_select_indices(torch.tensor([0, 5]))
        assert torch.equal(cache.layers[1].operator_state, state[[2, 1]])
        if kv:
            assert cache.layers[1].keys.shape[0] == 2

    def test_num_return_sequences(self, small_model, ids):
        torch.manual_seed(0)
        tokens = small_model().generate(ids[:2], max_new_tokens=4, do_sample=True, num_return_sequences=3)
        assert tokens.shape == (6, 20)

    def test_crop_keeps_the_prompts_G(self, small_model, ids):
        model = small_model()
        with torch.no_grad():
            cache = make_cache(model.config)
            model(ids[:, :9], past_key_values=cache)
            state = cache.layers[0].operator_state
            expected = model(ids[:, 9:12], past_key_values=cache).logits
            cache.crop(-3)
            assert cache.get_seq_length() == 9
            assert cache.layers[0].operator_state is state
            assert_close(model(ids[:, 9:12], past_key_values=cache).logits, expected, max_error=1e-6)
            # Nothing of the sequence left: the next prompt brings its own G_LM.
            cache.crop(-12)
            model(ids[:, 3:12], past_key_values=cache)
        assert not torch.equal(cache.layers[0].operator_state, state)

    def test_reset(self, small_model, ids):
        model = small_model()
        for cache in (make_cache(model.config), make_cache(model.config, max_cache_len=20),
                      make_cache(model.config, kv=False)):  # fmt: skip
            with torch.no_grad():
                model(ids[:, :5], past_key_values=cache)
                cache.reset()
                logits = model(ids, past_key_values=cache).logits
                assert_close(logits, model(ids, use_cache=False).logits, max_error=1e-5)


class TestStatic:
    @pytest.mark.parametrize("operator", ["learned", "constant"])
    def test_same_tokens_as_the_dynamic_cache(self, small_model, ids, operator):
        model = small_model(operator=operator, operator_init="random")
        expected = continuation(model, ids)
        assert torch.equal(continuation(model, ids, cache_implementation="static"), expected)
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        padded = continuation(model, ids, attention_mask=mask)
        assert torch.equal(continuation(model, ids, attention_mask=mask, cache_implementation="static"), padded)

    def test_layers_and_fixed_addresses(self, small_model, ids):
        model = small_model()
        cache = StaticCache(model.config, max_cache_len=20)
        assert [type(layer) for layer in cache.layers] == [StaticPlgaLayer] * 2
        with torch.no_grad():
            model(ids, past_key_values=cache)
            address = cache.layers[0].operator_state.data_ptr()
            cache.reorder_cache(torch.tensor([1, 0, 2]))
            cache.reset()
            model(ids, past_key_values=cache)
        assert cache.layers[0].operator_state.data_ptr() == address

    @pytest.mark.parametrize("operator", ["learned", "constant"])
    def test_decode_step_compiles_once_without_breaks(self, small_model, ids, operator):
        model = small_model(operator=operator, operator_init="random")
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph.forward

        cache = make_cache(model.config, max_cache_len=20)
        step = torch.compile(model, fullgraph=True, backend=counting)
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache)
            eager = make_cache(model.config)
            model(ids[:, :9], past_key_values=eager)
            for i in range(9, 14):
                token, position = ids[:, i : i + 1], torch.full((3, 1), i)
                masks = model.create_masks_for_generate(
                    model.config, model.model.embed_tokens(token), None, cache, position
                )
                logits = step(
                    input_ids=token, attention_mask=masks, position_ids=position, past_key_values=cache
                ).logits
                assert_close(logits, model(token, past_key_values=eager).logits, max_error=2e-5)
        assert len(graphs) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("operator", ["learned", "constant"])
    def test_the_prompt_compiles_too(self, small_model, ids, operator):
        """From an empty cache, whose operator state the graph makes."""
        model = small_model(operator=operator, operator_init="random")
        expected = continuation(model, ids)
        cache = make_cache(model.config, max_cache_len=16 + expected.shape[1])
        forward = torch.compile(model, fullgraph=True, backend="eager")
        tokens, new = [], ids
        with torch.no_grad():
            for step in range(expected.shape[1]):
                positions = (torch.arange(16) if step == 0 else torch.tensor([15 + step])).expand(len(ids), -1)
                embedded = model.model.embed_tokens(new)
                masks = model.create_masks_for_generate(model.config, embedded, None, cache, positions)
                logits = forward(new, attention_mask=masks, position_ids=positions, past_key_values=cache).logits
                new = logits[:, -1:].argmax(-1)
                tokens.append(new)
        assert torch.equal(torch.cat(tokens, dim=1), expected)


class TestUnusualCalls:
    @pytest.mark.parametrize("operator", ["learned", "constant"])
    @pytest.mark.parametrize(("kv", "g"), MODES)
    def test_beams_in_every_mode(self, small_model, ids, operator, kv, g):
        model = small_model(operator=operator, operator_init="random")
        settings = {"use_cache": kv, "use_g_cache": g, "num_beams": 3}
        tokens = continuation(model, ids[:2], **settings)
        for row in range(2):
            assert torch.equal(tokens[row : row + 1], continuation(model, ids[row : row + 1], **settings))

    def test_assisted_decoding(self, small_model, frozen_model, ids):
        """No guess enters G_LM, which is the prompt's."""
        for model in (small_model(), frozen_model):
            for prompt in (ids[:1].repeat(1, 2), ids[:1, :1]):
                expected = continuation(model, prompt)
                for settings in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": frozen_model}):
                    assert torch.equal(continuation(model, prompt, **settings), expected)

    @pytest.mark.parametrize("static", [False, True])
    def test_a_mask_as_long_as_a_static_cache(self, small_model, ids, static):
        model = small_model()
        mask = torch.zeros(3, 20, dtype=torch.long)
        mask[:, :16] = 1
        mask[0, :4] = 0
        with torch.no_grad():
            expected = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=False).logits
            cache = make_cache(model.config, max_cache_len=20 if static else None)
            prefill = model(ids[:, :12], attention_mask=mask if static else mask[:, :12], past_key_values=cache).logits
            assert_close(prefill[:, 4:], expected[:, 4:], max_error=1e-5)
            plain = make_cache(model.config)
            model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=plain)
            step = model(ids[:, 12:13], attention_mask=mask, past_key_values=cache).logits if static else None
            wanted = model(ids[:, 12:13], attention_mask=mask[:, :13], past_key_values=plain).logits
        if static:
            assert_close(step, wanted, max_error=1e-5)

    def test_a_mask_of_the_new_tokens_alone_is_refused(self, small_model, ids):
        model = small_model()
        cache = model(ids[:, :10]).past_key_values
        with pytest.raises(ValueError, match="attention_mask: covers 6 tokens, but there are 10 earlier and 6 new"):
            model(ids[:, 10:], attention_mask=torch.ones(3, 6), past_key_values=cache)

    def test_caches_that_do_not_fit_the_call(self, small_model, ids):
        model = small_model()
        with pytest.raises(ValueError, match="keeps no keys and values; pass use_cache=False"):
            continuation(model, ids, past_key_values=make_cache(model.config, kv=False))
        only_g = make_cache(model.config, kv=False)
        model(ids[:1], past_key_values=only_g)
        with pytest.raises(ValueError, match="holds G_LM of 1 sequences, the input has 3"):
            model(ids, past_key_values=only_g)
        with pytest.raises(ValueError, match="the given past_key_values decides"):
            model(ids, past_key_values=make_cache(model.config), use_g_cache=False)

    def test_static_caches_end_with_the_context(self, small_model, ids):
        model = small_model()
        with pytest.raises(ValueError, match="max_cache_len=65 is longer than the context length"):
            make_cache(model.config, max_cache_len=65)
        with pytest.raises(ValueError, match="max_length=76 is longer than the context length"):
            model.generate(ids, max_new_tokens=60, cache_implementation="static")

    def test_gradient_checkpointing_beside_a_cache(self, small_model, ids):
        model = small_model().train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids, labels=ids, past_key_values=make_cache(model.config)).loss.backward()
        assert model.model.layers[0].self_attn.operator.exponent.grad.abs().sum() > 0


def test_a_learned_operator_compiles_whole_with_a_static_cache(small_model, ids):
    """The prompt's forward too, which makes the operator's state."""
    torch._dynamo.reset()  # other models of this process count towards what may be compiled
    model = small_model()
    with torch.no_grad():
        expected = model(ids).logits
        forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        cache = make_cache(model.config, max_cache_len=32)
        assert_close(forward(ids, past_key_values=cache).logits, expected, max_error=1e-5)
        assert all(layer.has_operator_state for layer in cache.layers)
